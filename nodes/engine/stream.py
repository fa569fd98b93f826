"""The events of one generation, from the engine to the one task that reads them. Trio thread only."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import trio

from nodes.engine.errors import EngineError, EngineOverflow
from nodes.engine.sequence import EngineEvent

# Events that wait for one reader, a token each: more than 20 s at 50 tokens a second, when clients that read nothing
# are closed anyway.
STREAM_EVENTS_MAX = 1024


class EngineStream(trio.abc.ReceiveChannel[EngineEvent]):
    """The events of one generation. It ends after the event with a finish_reason, or raises an EngineError once.

    A read takes all that waits, as one event: a reader that is late gets fewer and larger ones. Closing it cancels,
    and frees the slot within one step; it may be closed by any task of the trio thread, and again after the end.
    """

    def __init__(self, cancel: Callable[[], None], *, submitted_at: float = 0.0) -> None:
        """cancel: ends the generation; called at every aclose(). submitted_at: on the engine's clock."""
        self.submitted_at = submitted_at
        self.queued_s: float | None = None  # how long it waited for a slot; known with the first event
        self.first_event_at: float | None = None  # on the engine's clock, as ended_at
        self.ended_at: float | None = None
        self._cancel = cancel
        self._error: EngineError | None = None
        self._send, self._receive = trio.open_memory_channel[EngineEvent](STREAM_EVENTS_MAX)

    async def receive(self) -> EngineEvent:
        """Raises trio.EndOfChannel after the last event, trio.ClosedResourceError once closed, and EngineError."""
        try:
            event = await self._receive.receive()
        except trio.EndOfChannel:
            error, self._error = self._error, None
            if error is not None:
                raise error from None
            raise
        with suppress(trio.WouldBlock, trio.EndOfChannel):
            while True:
                event = event.merged_with(self._receive.receive_nowait())
        return event

    async def aclose(self) -> None:
        self._cancel()
        self._receive.close()
        await trio.lowlevel.checkpoint()

    # For the engine.

    def offer(self, event: EngineEvent) -> bool:
        """False when the reader has left STREAM_EVENTS_MAX events unread; the stream has then ended with EngineOverflow
        after these."""
        try:
            self._send.send_nowait(event)
        except trio.WouldBlock:
            self.end(EngineOverflow(f"the reader left {STREAM_EVENTS_MAX} events unread"))
            return False
        return True

    def end(self, error: EngineError | None) -> None:
        """Nothing follows; after what waits the reader gets the error, or the end."""
        self._error = error
        self._send.close()
