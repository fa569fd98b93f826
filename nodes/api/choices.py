"""The answers to one request, each a stream of its own, read as they come.

Several are read by a task each, which hands over one event and waits until it is taken: no answer waits for another,
none gets ahead, and what a slow client leaves unread stays with the streams, which bound it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

import trio

from mesh.errors import MeshError
from nodes.dispatched_stream import DispatchedStream
from nodes.generation import GenerateEvent, GenerationError

Failure = GenerationError | MeshError
Item = tuple[int, GenerateEvent]


class Choices:
    """Several streams can be read while it is entered, a single one always. It does not close them."""

    def __init__(self, streams: Sequence[DispatchedStream]) -> None:
        self.streams = tuple(streams)
        self._ready: deque[Item] = deque()
        self._failure: Failure | None = None
        self._unfinished = len(streams)
        self._stack = AsyncExitStack()
        self._incoming: trio.MemoryReceiveChannel[Item | Failure] | None = None

    @property
    def node_ids(self) -> tuple[str, ...]:
        """Who generates them, each once."""
        return tuple(dict.fromkeys(stream.node_id for stream in self.streams))

    async def wait_first(self, seconds: float) -> None:
        """Until one of them has an event or has failed, or the time is over. Raises GenerationError and MeshError."""
        with trio.move_on_after(seconds):
            if len(self.streams) == 1:
                self._ready.append((0, await self.streams[0].receive()))
                return
            async with trio.open_nursery() as nursery:
                for index, stream in enumerate(self.streams):
                    nursery.start_soon(self._read_first, index, stream, nursery.cancel_scope)
        if self._failure is not None:
            raise self._failure

    async def _read_first(self, index: int, stream: DispatchedStream, scope: trio.CancelScope) -> None:
        try:
            self._ready.append((index, await stream.receive()))
        except (GenerationError, MeshError) as exc:
            self._failure = exc
        scope.cancel()

    async def collect(self, generated: Callable[[int], None]) -> tuple[GenerateEvent, ...]:
        """Each answer as one event. generated: told the tokens of each event as it comes. Raises GenerationError and
        MeshError."""
        answers = [_Answer() for _ in self.streams]
        async with self:
            while self._unfinished:
                index, event = await self.receive()
                generated(len(event.token_ids))
                answers[index].add(event)
        return tuple(answer.event() for answer in answers)

    @property
    def has_ended(self) -> bool:
        """Each has given its last event."""
        return not self._unfinished

    async def receive(self) -> Item:
        """The next event, and of which answer it is; not after has_ended. Raises GenerationError and MeshError."""
        item: Item | Failure
        if self._ready:
            item = self._ready.popleft()
        elif self._incoming is not None:
            item = await self._incoming.receive()
        else:
            item = (0, await self.streams[0].receive())
        if isinstance(item, Exception):
            raise item
        self._unfinished -= item[1].finish_reason is not None
        return item

    async def __aenter__(self) -> Choices:
        if len(self.streams) > 1:
            nursery = await self._stack.enter_async_context(trio.open_nursery())
            self._stack.callback(nursery.cancel_scope.cancel)
            send, self._incoming = trio.open_memory_channel[Item | Failure](0)
            finished = {index for index, event in self._ready if event.finish_reason is not None}
            for index, stream in enumerate(self.streams):
                if index not in finished:
                    nursery.start_soon(self._pump, index, stream, send)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    async def _pump(self, index: int, stream: DispatchedStream, send: trio.MemorySendChannel[Item | Failure]) -> None:
        try:
            async for event in stream:
                await send.send((index, event))
        except (GenerationError, MeshError) as exc:
            await send.send(exc)


class _Answer:
    """The events of one answer, joined at the end."""

    def __init__(self) -> None:
        self._events: list[GenerateEvent] = []

    def add(self, event: GenerateEvent) -> None:
        self._events.append(event)

    def event(self) -> GenerateEvent:
        last = self._events[-1]
        return GenerateEvent(
            "".join(event.text for event in self._events),
            tuple(token_id for event in self._events for token_id in event.token_ids),
            last.finish_reason,
            last.usage,
            tuple(row for event in self._events for row in event.logprobs),
        )
