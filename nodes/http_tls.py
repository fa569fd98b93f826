"""TLS on a watched connection: what hypercorn reads and writes in clear is sealed on its way to the socket.

Over Python's memory BIOs and not trio's SSLStream, because the end of a connection is decided where nobody may wait
(close_softly), and its close_notify is sent from there; without one, a client cannot tell an end from a cut.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from contextlib import suppress

import trio

from nodes.http_connection import HANDSHAKE, READ_BYTES, WatchedStream


class TlsStream(WatchedStream):
    """note_closed: told of HANDSHAKE where a client gets no further. hypercorn calls do_handshake() first, bounded by
    its ssl_handshake_timeout, then asks for the protocol."""

    def __init__(
        self,
        stream: trio.SocketStream,
        on_not_reading: Callable[[], None],
        context: ssl.SSLContext,
        note_closed: Callable[[str], None],
    ) -> None:
        super().__init__(stream, on_not_reading)
        self._note_closed = note_closed
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._sealing = trio.Lock()  # records go out in the order in which they were sealed
        self._is_open = False
        self._has_spoken = False

    @property
    def transport_stream(self) -> TlsStream:
        """hypercorn asks its socket for both addresses."""
        return self

    @property
    def is_silent(self) -> bool:
        return self._is_open and super().is_silent

    def selected_alpn_protocol(self) -> str | None:
        return self._tls.selected_alpn_protocol()

    async def do_handshake(self) -> None:
        """Raises trio.BrokenResourceError for a client that cannot, or does not speak TLS."""
        try:
            while True:
                try:
                    self._tls.do_handshake()
                except ssl.SSLWantReadError:
                    await self._flush()
                    if not await self._feed():
                        raise trio.BrokenResourceError("the client left within the TLS handshake") from None
                    self._has_spoken = True
                    continue
                await self._flush()
                self._is_open = True
                return
        except ssl.SSLError as exc:
            await self._flush()  # the alert that says why
            raise trio.BrokenResourceError("no TLS handshake") from exc
        except trio.ClosedResourceError as exc:
            raise trio.BrokenResourceError("the connection ended within the TLS handshake") from exc
        finally:
            if not self._is_open and self._has_spoken:  # balancers open connections only to see whether they can
                self._note_closed(HANDSHAKE)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Raises trio.BrokenResourceError as WatchedStream's."""
        async with self._sealing:
            if self.is_closing:
                raise trio.BrokenResourceError("this side has ended the connection")
            if data:
                try:
                    self._tls.write(data)  # memory takes all of it
                except ssl.SSLError as exc:
                    raise trio.BrokenResourceError("the TLS connection is broken") from exc
            await super().send_all(self._outgoing.read())

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Raises trio.ClosedResourceError as WatchedStream's, trio.BrokenResourceError for bytes that are no TLS."""
        while True:
            if self.is_closing:
                return await super().receive_some(max_bytes)  # which drops what comes
            try:
                data = self._tls.read(max_bytes or READ_BYTES)
            except ssl.SSLWantReadError:
                await self._flush()  # the answer to a client that renews its keys
                if not await self._feed():
                    return b""
                continue
            except ssl.SSLZeroReturnError:
                return b""
            except ssl.SSLError as exc:
                raise trio.BrokenResourceError("the client sends what is no TLS") from exc
            await trio.lowlevel.checkpoint()
            return data

    def close_softly(self) -> None:
        if not self.is_closing and self._is_open:
            with suppress(ssl.SSLError):
                self._tls.unwrap()  # writes close_notify, and does not wait for the client's
            if self._outgoing.pending and not self._sealing.locked():
                with suppress(OSError):  # its buffer is full, or the client has gone
                    os.write(self.socket.fileno(), self._outgoing.read())
        super().close_softly()

    async def _feed(self) -> bool:
        """Take in what comes; False at the client's end."""
        data = await super().receive_some(READ_BYTES)
        if data:
            self._incoming.write(data)
        return bool(data)

    async def _flush(self) -> None:
        if self._outgoing.pending:
            async with self._sealing:
                await super().send_all(self._outgoing.read())
