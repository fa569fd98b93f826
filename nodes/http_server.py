"""Serves the HTTP application with hypercorn's protocols over connections that this module owns.

hypercorn shields every write from cancellation, so a client that stops reading would hold its task, its stream and the
node's shutdown for as long as it likes. Here each write has a deadline of its own, which no shield outlasts.
"""

from __future__ import annotations

import logging
import socket
from functools import partial
from typing import Any

import hypercorn
import trio
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import wrap_app

logger = logging.getLogger(__name__)

# A client that takes nothing for this long is closed.
WRITE_TIMEOUT_S = 20.0
# Written at a time, so that a slow reader of a long body shows progress.
WRITE_BYTES = 64 * 1024
# Longer than the 60 s for which balancers in front keep idle connections.
KEEP_ALIVE_TIMEOUT_S = 75.0
KEEP_ALIVE_REQUESTS_MAX = 100_000


class WatchedStream(trio.abc.HalfCloseableStream):
    """A connection whose writes end: after WRITE_TIMEOUT_S without progress, or at abort()."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.socket = stream.socket  # hypercorn asks it for both addresses
        self._stream = stream
        self._writing: trio.CancelScope | None = None
        self._is_aborted = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Raises trio.BrokenResourceError when the client takes nothing for too long, or after abort()."""
        view = memoryview(data)
        for start in range(0, len(view), WRITE_BYTES):
            if self._is_aborted:
                raise trio.BrokenResourceError("the connection was aborted")
            with trio.move_on_after(WRITE_TIMEOUT_S) as self._writing:
                await self._stream.send_all(view[start : start + WRITE_BYTES])
            if self._writing.cancelled_caught:
                logger.info("closed a connection whose client does not read")
                self.abort()
                raise trio.BrokenResourceError("the client does not read")
        self._writing = None

    def abort(self) -> None:
        """Fail the write in progress and all later ones."""
        self._is_aborted = True
        if self._writing is not None:
            self._writing.cancel()

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._stream.receive_some(max_bytes)

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()


async def serve_http(
    app: Any,
    bound: socket.socket,
    *,
    stop: trio.Event,
    close_s: float,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve an ASGI application on a listening socket, which stays the caller's, until `stop`.

    Then idle connections close at once; the others have close_s to finish, and are aborted after it.
    """
    config = _hypercorn_config()
    context = WorkerContext(None)
    application = wrap_app(app, config.wsgi_max_body_size, "asgi")
    connections: set[WatchedStream] = set()
    all_closed = trio.Event()

    async def handle(stream: trio.SocketStream) -> None:
        watched = WatchedStream(stream)
        connections.add(watched)
        try:
            await TCPServer(application, config, context, ConnectionState({}), watched)  # type: ignore[arg-type]
        finally:
            connections.discard(watched)
            if stop.is_set() and not connections:
                all_closed.set()

    listener = trio.SocketListener(trio.socket.from_stdlib_socket(bound.dup()))
    async with trio.open_nursery() as handlers:
        async with trio.open_nursery() as accepting:
            accepting.start_soon(partial(trio.serve_listeners, handle, [listener], handler_nursery=handlers))
            task_status.started()
            await stop.wait()
            accepting.cancel_scope.cancel()
        await context.terminated.set()
        if connections:
            with trio.move_on_after(close_s):
                await all_closed.wait()
        for connection in connections:
            connection.abort()
        handlers.cancel_scope.cancel()


def _hypercorn_config() -> hypercorn.Config:
    config = hypercorn.Config()
    config.errorlog = logging.getLogger("hypercorn.error")
    config.keep_alive_timeout = KEEP_ALIVE_TIMEOUT_S
    config.keep_alive_max_requests = KEEP_ALIVE_REQUESTS_MAX
    config.include_server_header = False
    return config
