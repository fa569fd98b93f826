"""Server-sent events: how a stream of chunks becomes a response body that ends honestly."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from types import TracebackType

from quart.wrappers.response import ResponseBody

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"

HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx passes events on at once
}


def data_event(payload: object) -> bytes:
    return b"data: " + json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def comment(text: str) -> bytes:
    """A line that clients ignore."""
    return b": " + " ".join(text.split()).encode() + b"\n\n"


def named_event(name: str, data: bytes, event_id: str = "") -> bytes:
    """data: one line."""
    head = f"event: {name}\n" + (f"id: {event_id}\n" if event_id else "")
    return head.encode() + b"data: " + data + b"\n\n"


class EventStreamBody(ResponseBody):
    """A response body over an async generator of encoded events, closed with the response.

    source: what the generator reads, entered around it: tasks may not outlive a generator that is not read to its end.
    """

    def __init__(
        self, events: AsyncGenerator[bytes, None], source: AbstractAsyncContextManager[object] | None = None
    ) -> None:
        self._events = events
        self._source = source

    async def __aenter__(self) -> AsyncGenerator[bytes, None]:
        if self._source is not None:
            await self._source.__aenter__()
        return self._events

    async def __aexit__(self, exc_type: type, exc_value: BaseException, tb: TracebackType) -> None:
        try:
            await self._events.aclose()
        finally:
            if self._source is not None:
                await self._source.__aexit__(exc_type, exc_value, tb)
