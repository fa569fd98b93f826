"""Serves the HTTP application, within bounds that no client can exceed, and ends without losing a request.

The end has steps, which nodes.drain takes: announce_drain() sends clients elsewhere while everything is still answered;
close_listener() refuses new connections, so that clients try their next address; close_idle() ends connections that
carry nothing; close() ends the rest. Bounds: connections (connections_max), a head (HEAD_TIMEOUT_S), a client that does
not read (WRITE_TIMEOUT_S), an idle connection (KEEP_ALIVE_TIMEOUT_S). The body's is nodes.api.request_body's.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import resource
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import hypercorn
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.trio.worker_context import WorkerContext

from nodes.certificate import Certificate
from nodes.config import ConfigInvalid
from nodes.http_connection import (
    FAULT,
    HEAD_TIMEOUT_S,
    LIMIT,
    LINGER_S,
    READ_BYTES,
    SCOPE_STATE_KEY,
    WRITE_BYTES,
    WRITE_TIMEOUT_S,
    Connection,
    WatchedStream,
)
from nodes.http_tls import TlsStream
from nodes.sockets import HTTP_BACKLOG
from nodes.strict_headers import HEAD_BYTES_MAX, refusal

logger = logging.getLogger(__name__)

# Longer than the 60 s for which balancers in front keep idle connections.
KEEP_ALIVE_TIMEOUT_S = 75.0
KEEP_ALIVE_REQUESTS_MAX = 100_000
# Without a configured number: this share of the file descriptors the process may have, and no more than the maximum.
CONNECTIONS_SHARE = 3 / 4
CONNECTIONS_MAX = 10_000
# For everything else: peer links, logs, the store, models.
DESCRIPTORS_RESERVED = 64
# Connections beyond the maximum that are being told so; what comes beyond these is closed without a word.
REFUSALS_MAX = 64
# Out of descriptors, the next try to accept is after this.
ACCEPT_PAUSE_S = 0.1
CLOSE_POLL_S = 0.05
# Paths of requests that a drain does not wait for.
NOT_WAITED_FOR = ("/admin", "/cluster/events")
# A request this recent means that its client, or a balancer, may come again and has to be told of a drain.
RECENT_REQUEST_S = 10.0

_ERROR = {
    "message": "this node has as many connections open as it takes; try again, or another node",
    "type": "server_error",
    "param": None,
    "code": "too_many_connections",
}
_REFUSAL = refusal(
    b"503 Service Unavailable",
    b"retry-after: 1\r\nretry-after-ms: 1000\r\ncontent-type: application/json\r\n",
    json.dumps({"error": _ERROR}).encode(),
)
_OUT_OF_DESCRIPTORS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}


@dataclass(frozen=True, slots=True)
class HttpStatistics:
    """connections: open now. closed: those closed against their client's will, by nodes.http_connection's reason."""

    connections: int
    closed: Mapping[str, int]


class HttpServer:
    """Made inside trio. listener: listening and not blocking; its caller may close it too."""

    def __init__(
        self, app: Any, listener: socket.socket, connections_max: int, certificate: Certificate | None = None
    ) -> None:
        """certificate: None serves plain HTTP."""
        self._app = app
        self._certificate = certificate
        self._listener = listener
        self._accepting = trio.SocketListener(trio.socket.from_stdlib_socket(listener.dup()))
        self._connections_max = connections_max
        self._config = _hypercorn_config()
        self._context = WorkerContext(None)
        self._wrapped = ASGIWrapper(self._application)
        self._connections: set[Connection] = set()
        self._refusals = 0
        self._closed: Counter[str] = Counter()
        self._requests = 0
        self._last_request_at = -math.inf
        self._is_draining = False
        self._handlers: trio.Nursery | None = None
        self._is_over = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until close()."""
        try:
            async with trio.open_nursery() as self._handlers:
                self._handlers.start_soon(self._accept)
                if self._certificate is not None:
                    self._handlers.start_soon(self._certificate.watch)
                task_status.started()
                await self._is_over.wait()
                self._handlers.cancel_scope.cancel()
        finally:
            self._accepting.socket.close()

    def statistics(self) -> HttpStatistics:
        return HttpStatistics(len(self._connections), dict(self._closed))

    @property
    def is_in_use(self) -> bool:
        """Somebody may come again: a connection is open, or a request came RECENT_REQUEST_S ago or later."""
        return bool(self._connections) or trio.current_time() - self._last_request_at < RECENT_REQUEST_S

    @property
    def requests(self) -> int:
        """Requests that run now, those of operators not counted: one of them may be waiting for the drain, and who
        watches events does so without end."""
        return self._requests

    @property
    def has_idle(self) -> bool:
        """Some connection is open on which a next request may come."""
        return any(connection.is_idle for connection in self._connections)

    # The drain.

    def announce_drain(self) -> None:
        """From now on every answer tells its client to open its next connection elsewhere. May be repeated."""
        self._is_draining = True
        if self._handlers is not None:
            for connection in self._connections:
                self._handlers.start_soon(connection.announce_drain)

    def end_drain(self) -> None:
        self._is_draining = False

    def close_listener(self) -> None:
        """Refuse new connections. What the kernel had accepted already is served. May be repeated."""
        if self._listener.fileno() < 0:
            return
        # Without an await: between the last of these and close() no connection is lost but by microseconds.
        try:
            for _ in range(HTTP_BACKLOG):
                accepted, _address = self._listener.accept()
                accepted.setblocking(False)
                self._admit(trio.SocketStream(trio.socket.from_stdlib_socket(accepted)))
        except BlockingIOError:  # none is left
            pass
        except (
            OSError
        ) as exc:  # out of descriptors, or one that has left already: a node that ends cannot wait for more
            logger.error("cannot accept a connection", extra={"reason": exc.strerror})
        self._accepting.socket.close()
        self._listener.close()

    def close_idle(self, idle_s: float) -> None:
        """Close the connections that have carried nothing for so long. A request that has just come is served."""
        for connection in self._connections:
            connection.close_if_unused(idle_s)

    async def close(self, close_s: float) -> None:
        """End idle connections at once; the others have close_s to finish, and are aborted after it."""
        self.close_listener()
        await self._context.terminated.set()
        with trio.move_on_after(close_s):
            while not all(connection.stream.is_closing for connection in self._connections):
                await trio.sleep(CLOSE_POLL_S)
        for connection in self._connections:
            connection.abort()
        self._is_over.set()

    # Connections.

    async def _accept(self) -> None:
        while True:
            try:
                self._admit(await self._accepting.accept())
            except trio.ClosedResourceError:
                return
            except OSError as exc:
                if exc.errno not in _OUT_OF_DESCRIPTORS:
                    raise
                logger.error("cannot accept a connection", extra={"reason": exc.strerror})
                await trio.sleep(ACCEPT_PAUSE_S)

    def _admit(self, stream: trio.SocketStream) -> None:
        assert self._handlers is not None
        if len(self._connections) >= self._connections_max:
            self._closed[LIMIT] += 1
            if self._refusals >= REFUSALS_MAX:
                stream.socket.close()
                return
            self._refusals += 1
            self._handlers.start_soon(self._refuse, stream)
            return
        connection = Connection(
            self._wrapped,
            self._config,
            self._context,
            stream,
            lambda: self._is_draining,
            self._note_closed,
            self._watch,
        )
        self._connections.add(connection)
        self._handlers.start_soon(self._serve, connection)

    def _watch(self, stream: trio.SocketStream, on_not_reading: Callable[[], None]) -> WatchedStream:
        if self._certificate is None:
            return WatchedStream(stream, on_not_reading)
        return TlsStream(stream, on_not_reading, self._certificate.context, self._note_closed)

    async def _serve(self, connection: Connection) -> None:
        try:
            await connection.run()
        except* Exception as group:  # a client that hypercorn did not expect; it must not end the node
            self._note_closed(FAULT)
            logger.error("a connection failed", exc_info=group)
        finally:
            self._connections.discard(connection)

    async def _refuse(self, stream: trio.SocketStream) -> None:
        """Say why, then wait for the client's end: closing earlier could take the answer from it."""
        try:
            with trio.move_on_after(LINGER_S):
                if self._certificate is None:  # a handshake is what it is to be spared
                    await stream.send_all(_REFUSAL)
                await stream.send_eof()
                while await stream.receive_some(READ_BYTES):
                    pass
        except trio.BrokenResourceError:
            pass
        finally:
            self._refusals -= 1
            stream.socket.close()

    def _note_closed(self, reason: str) -> None:
        self._closed[reason] += 1

    # Requests.

    async def _application(self, scope: Any, receive: Any, send: Any) -> None:
        """The application, its requests counted, its answers marked while draining, its HTTP/2 writes bounded."""
        if scope["type"] == "websocket":  # of HTTP/2 (RFC 8441); hypercorn answers 403
            await send({"type": "websocket.close"})
            return
        is_operators = scope["path"].startswith(NOT_WAITED_FOR)
        is_http2 = scope["http_version"] == "2"
        connection = scope["state"].pop(SCOPE_STATE_KEY)
        self._last_request_at = trio.current_time()
        self._requests += not is_operators

        async def marked(message: Any) -> None:
            if message["type"] == "http.response.start" and self._is_draining:
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        async def bounded(message: Any) -> None:
            # Flow control holds an HTTP/2 stream while nothing is written, so the watch of writes does not see it.
            for piece in _pieces(message):
                if connection.has_ended:
                    return
                with trio.move_on_after(WRITE_TIMEOUT_S) as writing:
                    await send(piece)
                    if piece.get("body"):
                        await connection.http2_body_sent(send.__self__.stream_id)
                if writing.cancelled_caught:
                    connection.give_up()
                    await trio.sleep_forever()  # until hypercorn tells the application that its client has left

        try:
            await self._app(scope, receive, bounded if is_http2 else marked)
        finally:
            self._requests -= not is_operators
            self._last_request_at = trio.current_time()


def connections_max(configured: int | None) -> int:
    """How many connections a node takes. Raises ConfigInvalid for more than the process has file descriptors for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return configured or CONNECTIONS_MAX
    if configured is None:
        return max(1, min(CONNECTIONS_MAX, int(soft * CONNECTIONS_SHARE)))
    if configured + REFUSALS_MAX + DESCRIPTORS_RESERVED > soft:
        needed = configured + REFUSALS_MAX + DESCRIPTORS_RESERVED
        raise ConfigInvalid(
            f"http_connections_max {configured} needs {needed} file descriptors, and this process may have {soft}; "
            f"raise that (ulimit -n {needed}, or LimitNOFILE= of systemd) or give a smaller number"
        )
    return configured


def _pieces(message: Any) -> list[Any]:
    """A long body as several messages, so that a slow reader shows progress."""
    body = message.get("body", b"") if message["type"] == "http.response.body" else b""
    if len(body) <= WRITE_BYTES:
        return [message]
    parts = [body[start : start + WRITE_BYTES] for start in range(0, len(body), WRITE_BYTES)]
    pieces = [{**message, "body": part, "more_body": True} for part in parts]
    pieces[-1]["more_body"] = message.get("more_body", False)
    return pieces


def _hypercorn_config() -> hypercorn.Config:
    config = hypercorn.Config()
    config.errorlog = logging.getLogger("hypercorn.error")
    config.keep_alive_timeout = KEEP_ALIVE_TIMEOUT_S
    config.keep_alive_max_requests = KEEP_ALIVE_REQUESTS_MAX
    config.include_server_header = False
    config.ssl_handshake_timeout = HEAD_TIMEOUT_S
    config.h11_max_incomplete_size = HEAD_BYTES_MAX
    config.h2_max_header_list_size = HEAD_BYTES_MAX
    return config
