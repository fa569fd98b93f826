"""One HTTP connection, run by hypercorn's protocols over a stream whose writes, heads and ends are bounded.

hypercorn shields every write from cancellation and waits on its keep-alive timer after a client has gone, so a client
that stops reading, trickles, or leaves would hold its task for as long as it likes. Whatever is closed here is closed
softly first: nothing more is sent, and what still comes is read and dropped for LINGER_S, since closing a socket with
unread bytes in it resets the connection and takes the answer's last bytes from the client.
"""

from __future__ import annotations

import logging
import math
import socket
import struct
from collections.abc import Callable
from typing import Any

import h11
import trio
from h2.exceptions import H2Error
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import StreamClosed
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.ws_stream import WSStream
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hyperframe.exceptions import HyperframeError

from nodes.strict_headers import slow_head_refusal, with_strict_headers

logger = logging.getLogger(__name__)

# A client that takes nothing for this long is closed.
WRITE_TIMEOUT_S = 20.0
# Written at a time, so that a slow reader of a long body shows progress.
WRITE_BYTES = 64 * 1024
READ_BYTES = 64 * 1024
# From the first byte of a request's head to its last; hypercorn bounds its size at 16 KiB.
HEAD_TIMEOUT_S = 10.0
# How long a connection that this side has ended is read, until its client ends it too.
LINGER_S = 2.0

# Why connections were closed against their client's will, as the metric's label.
SLOW_HEAD = "slow_head"
NOT_READING = "not_reading"
LIMIT = "limit"
FAULT = "fault"
HANDSHAKE = "handshake"
CLOSE_REASONS = (SLOW_HEAD, NOT_READING, LIMIT, FAULT, HANDSHAKE)

# The key under which an ASGI scope's state holds its connection.
SCOPE_STATE_KEY = "ai_cluster.connection"

_RESET_AT_CLOSE = struct.pack("ii", 1, 0)
_SLOW_HEAD_ANSWER = slow_head_refusal(HEAD_TIMEOUT_S)
# HTTP/2's graceful GOAWAY: no new streams, and all that were begun are answered (RFC 9113, 6.8).
_GOAWAY = b"\x00\x00\x08\x07\x00" + bytes(4) + b"\x7f\xff\xff\xff" + bytes(4)


class WatchedStream(trio.abc.HalfCloseableStream):
    """A connection whose writes end after WRITE_TIMEOUT_S without progress, and everything at abort().

    aclose() ends it softly, and reading goes on until the client has ended it too, or LINGER_S; close() at once.
    """

    def __init__(self, stream: trio.SocketStream, on_not_reading: Callable[[], None]) -> None:
        self.socket = stream.socket  # hypercorn asks it for both addresses
        self._stream = stream
        self._on_not_reading = on_not_reading
        self._writing: trio.CancelScope | None = None
        self._reading: trio.CancelScope | None = None
        self._linger_until = math.inf
        self._is_aborted = False
        self._is_waiting = False

    @property
    def is_closing(self) -> bool:
        """Nothing more is sent."""
        return self._is_aborted or self._linger_until < math.inf

    @property
    def is_silent(self) -> bool:
        """Nothing has been received that the protocol has not seen: the reader waits, and the kernel holds nothing."""
        return self._is_waiting and not self.socket.is_readable()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Raises trio.BrokenResourceError when the client takes nothing for too long, or after abort()."""
        view = memoryview(data)
        for start in range(0, len(view), WRITE_BYTES):
            if self._is_aborted:
                raise trio.BrokenResourceError("the connection was aborted")
            with trio.move_on_after(WRITE_TIMEOUT_S) as self._writing:
                await self._stream.send_all(view[start : start + WRITE_BYTES])
            if self._writing.cancelled_caught:
                if not self._is_aborted:
                    self._on_not_reading()
                raise trio.BrokenResourceError("the client does not read")
        self._writing = None

    def reset(self) -> None:
        """As abort(), and what the kernel still holds for the client is dropped: nobody reads it."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
        self.abort()

    def abort(self) -> None:
        """Fail what is being written or read, and all that follows."""
        self._is_aborted = True
        for scope in (self._writing, self._reading):
            if scope is not None:
                scope.cancel()

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Raises trio.ClosedResourceError once this side has ended the connection and no more is to be read."""
        while not self._is_aborted:
            with trio.CancelScope(deadline=self._linger_until) as self._reading:
                self._is_waiting = True
                try:
                    await trio.lowlevel.wait_readable(self.socket)
                finally:
                    self._is_waiting = False
                data = await self._stream.receive_some(max_bytes)
            if self._reading.cancelled_caught:
                break
            if not self.is_closing:
                return data
            if not data:
                break
        raise trio.ClosedResourceError("this side has ended the connection")

    async def send_eof(self) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        self.close_softly()
        await trio.lowlevel.checkpoint()

    def close_softly(self) -> None:
        """Send nothing more; the client sees the end after all that was sent. May be repeated."""
        if self.is_closing:
            return
        self._linger_until = trio.current_time() + LINGER_S
        if self._reading is not None:
            self._reading.deadline = self._linger_until
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:  # the client has gone
            self.abort()

    def close(self) -> None:
        """At once, whatever is unread or unsent."""
        self.abort()
        self.socket.close()


class Http1(h11.Connection):
    """HTTP/1.1 as hypercorn reads it, but for websockets: their upgrade is left out (RFC 9110, 7.8), so that they are
    requests like any other, within the same bounds, and the application refuses them."""

    def next_event(self) -> Any:
        event = super().next_event()
        might_switch = self.their_state is h11.MIGHT_SWITCH_PROTOCOL  # type: ignore[attr-defined]
        if event is h11.PAUSED and might_switch and not self.trailing_data[0]:
            return h11.NEED_DATA  # of an upgrade that is not taken up; else nobody would see the client leave
        if not isinstance(event, h11.Request) or not _asks_for_websocket(event):
            return event
        headers = [(name, value) for name, value in event.headers.raw_items() if name.lower() != b"connection"]
        return h11.Request(method=event.method, headers=headers, target=event.target, http_version=event.http_version)


def _asks_for_websocket(request: h11.Request) -> bool:
    """As hypercorn sees it, whose white space is that of texts."""
    upgrades = (value.decode("latin1") for name, value in request.headers if name == b"upgrade")
    return any(upgrade.strip().lower() == "websocket" for upgrade in upgrades)


class Connection(TCPServer):
    """hypercorn's server of one connection. is_draining: an HTTP/2 client is told to send its next requests elsewhere.
    note_closed: told the reason when it is closed against its client's will. watch: makes its stream."""

    stream: WatchedStream  # type: ignore[assignment]

    def __init__(
        self,
        application: Any,
        config: Config,
        context: WorkerContext,
        stream: trio.SocketStream,
        is_draining: Callable[[], bool],
        note_closed: Callable[[str], None],
        watch: Callable[[trio.SocketStream, Callable[[], None]], WatchedStream] = WatchedStream,
    ) -> None:
        watched = watch(stream, self.give_up)
        super().__init__(application, config, context, {SCOPE_STATE_KEY: self}, watched)  # type: ignore[arg-type]
        self._is_draining = is_draining
        self._note_closed = note_closed
        self._running = trio.CancelScope()
        self._runs_request = False
        self._idle_since = trio.current_time()
        self._head_began: float | None = None
        self._has_ended = False
        self._is_announced = False

    async def run(self) -> None:
        """Until either side has ended it. Raises what hypercorn does not expect of a client."""
        try:
            with self._running:
                await super().run()
        finally:
            self.stream.close()

    def abort(self) -> None:
        """End it, and what runs on it, at once."""
        self.stream.abort()
        self._running.cancel()

    def give_up(self) -> None:
        """The client does not read."""
        if not self.stream.is_closing:
            logger.info("closed a connection whose client does not read")
            self._note_closed(NOT_READING)
            self.stream.reset()
        self.abort()

    async def http2_body_sent(self, stream_id: int) -> None:
        """Until the client has given credit for what its stream holds; hypercorn itself goes on without."""
        protocol = self._protocol()
        buffer = protocol.stream_buffers.get(stream_id) if isinstance(protocol, H2Protocol) else None
        if buffer is not None:
            await buffer.drain()

    @property
    def has_ended(self) -> bool:
        """The client has ended its side, of which HTTP/2 makes the end of all."""
        return self._has_ended

    @property
    def is_idle(self) -> bool:
        """Open, and no request runs; the next one may be on its way."""
        return not self._runs_request and not self.stream.is_closing

    def close_if_unused(self, idle_s: float) -> None:
        """Close it softly when it has been idle for so long and nothing of a next request has arrived."""
        is_long_idle = self.is_idle and trio.current_time() - self._idle_since >= idle_s
        if is_long_idle and not self._holds_part_of_head() and self.stream.is_silent:
            self.stream.close_softly()

    async def announce_drain(self) -> None:
        """Tell an HTTP/2 client, once. HTTP/1.1 has headers for it."""
        if not self._is_announced and isinstance(self._protocol(), H2Protocol):
            self._is_announced = True
            await self.protocol_send(RawData(_GOAWAY))

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, RawData) and isinstance(self._protocol(), H11Protocol):
            event = RawData(with_strict_headers(event.data))
        if not isinstance(event, Updated):
            await super().protocol_send(event)
            return
        if self._has_ended:  # the idle timer would outlast the connection
            return
        self._runs_request = not event.idle
        self._idle_since = trio.current_time()
        # The application's task says so as its last act, and is cancelled while it does; the timer must start anyway.
        with trio.CancelScope(shield=True):
            await super().protocol_send(event)
            if event.idle and self._is_draining():
                await self.announce_drain()

    async def _read_data(self) -> None:
        """As hypercorn's, with a bound for heads, and an end to the idle timer."""
        protocol = self._protocol()
        if isinstance(protocol, H11Protocol):
            protocol.connection = Http1(h11.SERVER, max_incomplete_event_size=self.config.h11_max_incomplete_size)
        try:
            while True:
                if (deadline := self._head_deadline()) < math.inf:
                    await self.idle_task.stop()  # the head's own bound is nearer
                with trio.CancelScope(deadline=deadline) as head:
                    data = await self.stream.receive_some(READ_BYTES)
                if head.cancelled_caught:
                    await self._refuse_slow_head()
                    continue
                try:
                    await self.protocol.handle(RawData(bytes(data)))
                except (ValueError, H2Error, HyperframeError) as exc:  # of an upgrade to h2c, which it does not check
                    self._refuse_bytes(exc)
                    await trio.lowlevel.checkpoint()
                await self._release_websockets()
                if not data:
                    break
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            pass
        self._has_ended = True
        await self.protocol.handle(Closed())
        await self._release_http2()
        await self.idle_task.stop()

    async def _release_http2(self) -> None:
        """Nothing takes from its buffers any more: whoever waits for that goes on, and its answer is over."""
        protocol = self._protocol()
        if isinstance(protocol, H2Protocol):
            for buffer in list(protocol.stream_buffers.values()):
                await buffer.close()

    async def _release_websockets(self) -> None:
        """Of HTTP/2 (RFC 8441): hypercorn keeps the stream of one that it has refused, and the connection with it."""
        protocol = self._protocol()
        if isinstance(protocol, H2Protocol):
            for stream_id, stream in list(protocol.streams.items()):
                if isinstance(stream, WSStream) and stream.closed:
                    await protocol.stream_send(StreamClosed(stream_id=stream_id))

    def _head_deadline(self) -> float:
        if self._runs_request or self.stream.is_closing or not self._holds_part_of_head():
            self._head_began = None
            return math.inf
        if self._head_began is None:
            self._head_began = trio.current_time()
        return self._head_began + HEAD_TIMEOUT_S

    def _holds_part_of_head(self) -> bool:
        protocol = self._protocol()
        return isinstance(protocol, H11Protocol) and bool(protocol.connection.trailing_data[0])

    def _protocol(self) -> H11Protocol | H2Protocol | None:
        """None before run()."""
        wrapper = getattr(self, "protocol", None)
        return None if wrapper is None else wrapper.protocol

    def _refuse_bytes(self, fault: Exception) -> None:
        logger.info("closed a connection whose client sent what is no HTTP", extra={"error.type": type(fault).__name__})
        self._note_closed(FAULT)
        self.abort()  # the protocol is in no state to go on, or to be told of an end

    async def _refuse_slow_head(self) -> None:
        logger.info("closed a connection whose client sends the head of a request too slowly")
        self._note_closed(SLOW_HEAD)
        await self.protocol_send(RawData(_SLOW_HEAD_ANSWER))
        self.stream.close_softly()
