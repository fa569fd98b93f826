"""The streams of a link: the opener's end, which reads events, and the server's end, which sends them.

What crosses is opaque: a request of bytes one way, msgpack-encodable objects the other. Closing the opener's end, or
losing the link, cancels the task at the server's end; nothing here waits for the network.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from mesh.errors import MeshError, ModelUnknown, NoCapacity, PeerUnavailable
from mesh.link import CODE_CHARS_MAX, CODE_NO_CAPACITY
from mesh.link_connection import LinkConnection
from mesh.link_events import EventsReceived, LinkEvent, StreamCancelled, StreamEnded, StreamOpened

logger = logging.getLogger(__name__)

# Events one stream may hold, unread at the opener or unsent at the server: at 50 tokens/s more than a minute. Whoever
# falls so far behind loses its stream; the others on the link do not wait for it.
STREAM_EVENTS_MAX = 4096

CODE_MODEL_UNKNOWN = "model_unknown"
CODE_INTERNAL = "internal"
CODE_OVERFLOW = "overflow"


class RemoteError(MeshError):
    """The peer ended the stream with an error of its own; str() is its message. code: the peer's word for it."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class StreamRefused(MeshError):
    """Raised while serving to end a stream with an error; the opener reads RemoteError with this code and message.

    code: a word of at most 64 characters."""

    def __init__(self, code: str, message: str, retry_after_s: float = 0.0) -> None:
        if not 0 < len(code) <= CODE_CHARS_MAX:
            raise ValueError(f"a code has 1 to {CODE_CHARS_MAX} characters, this one {len(code)}")
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class StreamCounts:
    """Totals over all links of a node, past ones included."""

    opened: int = 0
    served: int = 0
    cancels_sent: int = 0
    cancels_received: int = 0
    overflows: int = 0


class OutgoingStream(trio.abc.ReceiveChannel[object]):
    """What a peer answers to one request: objects as it sent them, decoded from msgpack, in order. One task reads it.

    Holds no nursery. Gives what arrived before a failure first, then raises the failure.
    """

    def __init__(self, link: OpenerLink, stream_id: int) -> None:
        self.stream_id = stream_id
        self._link = link
        self._events: deque[object] = deque()
        self._arrival = trio.lowlevel.ParkingLot()
        self._has_ended = False
        self._is_closed = False
        self._error: MeshError | None = None

    async def receive(self) -> object:
        """Raises trio.EndOfChannel after a complete stream, else PeerUnavailable, NoCapacity, ModelUnknown or
        RemoteError, also when read again; trio.ClosedResourceError after aclose()."""
        if self._events:
            await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            try:
                return self.receive_nowait()
            except trio.WouldBlock:
                await self._arrival.park()

    def receive_nowait(self) -> object:
        """As receive(); raises trio.WouldBlock when nothing is there."""
        if self._is_closed:
            raise trio.ClosedResourceError
        if self._events:
            return self._events.popleft()
        if not self._has_ended:
            raise trio.WouldBlock
        if self._error is not None:
            raise self._error
        raise trio.EndOfChannel

    async def aclose(self) -> None:
        """Cancels at the peer unless the stream has ended. Any number of times; complete even if cancelled itself."""
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        self._is_closed = True
        self._events.clear()
        self._link.cancel(self)
        self._arrival.unpark_all()

    def deliver(self, event: object) -> bool:
        """False when the reader has left STREAM_EVENTS_MAX events unread; the event is dropped then."""
        if len(self._events) >= STREAM_EVENTS_MAX:
            return False
        self._events.append(event)
        if self._arrival:
            self._arrival.unpark_all()
        return True

    def end(self, error: MeshError | None) -> None:
        """No event follows; error: why, unless the stream is complete."""
        self._has_ended = True
        self._error = error
        self._arrival.unpark_all()


class OpenerLink:
    """The initiator's end of a link."""

    def __init__(self, connection: LinkConnection, counts: StreamCounts) -> None:
        self.connection = connection
        self._counts = counts
        self._streams: dict[int, OutgoingStream] = {}

    @property
    def stream_count(self) -> int:
        return len(self._streams)

    async def run(self) -> None:
        """Returns when the link has ended; every stream still open has failed with PeerUnavailable by then."""
        try:
            await self.connection.run(self._handle)
        finally:
            fault = self.connection.fault or "the link was closed"
            streams, self._streams = self._streams, {}
            for stream in streams.values():
                stream.end(PeerUnavailable(f"node {self.connection.peer_node_id} broke a stream: {fault}"))

    def open(self, request: bytes) -> OutgoingStream:
        """Raises PeerUnavailable when the link has ended or is clogged, NoCapacity at its limit of streams, ValueError
        for a request too large."""
        connection = self.connection
        if not connection.is_running:
            raise PeerUnavailable(f"the link to node {connection.peer_node_id} has ended")
        if connection.is_full:
            waiting = connection.link.pending_bytes
            raise PeerUnavailable(f"node {connection.peer_node_id} has left {waiting} bytes unread")
        stream_id = connection.link.queue_open(request)
        stream = self._streams[stream_id] = OutgoingStream(self, stream_id)
        self._counts.opened += 1
        connection.note_use()
        connection.wake()
        return stream

    def cancel(self, stream: OutgoingStream, error: MeshError | None = None) -> None:
        """Nothing when the stream is over."""
        if self._streams.pop(stream.stream_id, None) is None:
            return
        stream.end(error)
        if self.connection.is_running and self.connection.link.queue_cancel(stream.stream_id):
            self._counts.cancels_sent += 1
            self.connection.wake()

    def _handle(self, event: LinkEvent) -> None:
        if isinstance(event, EventsReceived):
            streams = self._streams
            for stream_id, item in event.events:
                stream = streams.get(stream_id)
                if stream is not None and not stream.deliver(item):
                    self._counts.overflows += 1
                    message = f"{STREAM_EVENTS_MAX} events of one stream were left unread, which is the limit"
                    self.cancel(stream, RemoteError(CODE_OVERFLOW, message))
        elif isinstance(event, StreamEnded):
            stream = self._streams.pop(event.stream_id, None)
            if stream is not None:
                stream.end(_error_of(event))


class IncomingStream:
    """One request of a peer, while it is served.

    request: as the peer sent it. When the peer cancels or its link breaks, the serving task is cancelled."""

    def __init__(self, link: ServingLink, stream_id: int, request: bytes, peer_node_id: str) -> None:
        self.stream_id = stream_id
        self.request = request
        self.peer_node_id = peer_node_id
        self.scope = trio.CancelScope()
        self._link = link
        self._unsent = 0
        self._flush_count = 0

    async def send(self, event: object) -> None:
        """Queue one event; it leaves with all others that are queued by then. Never waits for the network.

        Raises ValueError or TypeError for an event that a frame cannot carry. A stream that gets too far ahead of its
        peer is ended, and this task cancelled.
        """
        self.send_nowait(event)
        await trio.lowlevel.checkpoint()

    def send_nowait(self, event: object) -> None:
        """As send(), for a task that sends for many streams at once. Nothing when the stream is over."""
        self._link.send(self, event)

    def count_unsent(self, flush_count: int) -> int:
        """Events of this stream that wait for the writer, one more included. flush_count: writes so far."""
        if flush_count != self._flush_count:
            self._flush_count = flush_count
            self._unsent = 0
        self._unsent += 1
        return self._unsent


class ServingLink:
    """The responder's end of a link: runs `serve` for every stream the peer opens, each in a task of its own."""

    def __init__(
        self, connection: LinkConnection, counts: StreamCounts, serve: Callable[[IncomingStream], Awaitable[None]]
    ) -> None:
        self.connection = connection
        self._counts = counts
        self._serve = serve
        self._streams: dict[int, IncomingStream] = {}

    @property
    def stream_count(self) -> int:
        return len(self._streams)

    async def run(self) -> None:
        """Returns when the link and every task that serves it have ended."""
        await self.connection.run(self._handle)

    def send(self, stream: IncomingStream, event: object) -> None:
        connection = self.connection
        if stream.stream_id not in self._streams or not connection.is_running:
            return
        if connection.is_full or stream.count_unsent(connection.flush_count) > STREAM_EVENTS_MAX:
            self._counts.overflows += 1
            self._end(stream, CODE_OVERFLOW, f"more than {STREAM_EVENTS_MAX} events could not be sent in time")
            stream.scope.cancel()
            return
        connection.link.queue_event(stream.stream_id, event)
        connection.wake()

    def _handle(self, event: LinkEvent) -> None:
        if isinstance(event, StreamOpened):
            stream = IncomingStream(self, event.stream_id, event.request, self.connection.peer_node_id)
            self._streams[event.stream_id] = stream
            self._counts.served += 1
            self.connection.nursery.start_soon(self._run_stream, stream)
        elif isinstance(event, StreamCancelled):
            cancelled = self._streams.pop(event.stream_id, None)
            if cancelled is not None:
                self._counts.cancels_received += 1
                cancelled.scope.cancel()

    async def _run_stream(self, stream: IncomingStream) -> None:
        try:
            with stream.scope:
                await self._serve(stream)
        except NoCapacity as exc:
            self._end(stream, CODE_NO_CAPACITY, str(exc), exc.retry_after_s)
        except ModelUnknown as exc:
            self._end(stream, CODE_MODEL_UNKNOWN, str(exc))
        except StreamRefused as exc:
            self._end(stream, exc.code, str(exc), exc.retry_after_s)
        except Exception as exc:
            # The text of the exception may quote the request; the peer gets its type alone.
            logger.exception("serving a peer's stream failed", extra={"peer": stream.peer_node_id})
            self._end(stream, CODE_INTERNAL, f"the node that served failed with {type(exc).__name__}")
        except BaseExceptionGroup as group:
            # Several children ended while the link did: the cancellation goes on, a failure among them is told here.
            failure, stop = group.split(Exception)
            if failure is not None:
                extra = {"peer": stream.peer_node_id}
                logger.error("a stream failed while it was cancelled", exc_info=failure, extra=extra)
            assert stop is not None
            raise stop from None
        else:
            self._end(stream, None, "")

    def _end(self, stream: IncomingStream, code: str | None, message: str, retry_after_s: float = 0.0) -> None:
        """Nothing when the stream is over: the peer cancelled it, or it has ended."""
        if self._streams.pop(stream.stream_id, None) is not None and self.connection.is_running:
            self.connection.link.queue_end(stream.stream_id, code, message, retry_after_s)
            self.connection.wake()


def _error_of(ended: StreamEnded) -> MeshError | None:
    if ended.code is None:
        return None
    if ended.code == CODE_NO_CAPACITY:
        return NoCapacity(ended.message, ended.retry_after_s)
    if ended.code == CODE_MODEL_UNKNOWN:
        return ModelUnknown(ended.message)
    return RemoteError(ended.code, ended.message)
