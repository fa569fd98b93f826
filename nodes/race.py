"""Two generations of one request, of which the one that speaks first is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from mesh.errors import MeshError
from nodes.attempts import Attempt
from nodes.generation import GenerateEvent, GenerationError


@dataclass(slots=True)
class Race:
    """winner and its event: None where all have failed. wasted_tokens: in events of others that came too late."""

    winner: Attempt | None = None
    event: GenerateEvent | None = None
    failures: list[tuple[Attempt, MeshError | GenerationError]] = field(default_factory=list)
    wasted_tokens: int = 0


async def race(attempts: Sequence[Attempt]) -> Race:
    """Read all until one gives an event. Closes none. Cancelled, it loses nothing: it may be called again."""
    result = Race()
    try:
        async with trio.open_nursery() as nursery:

            async def read(attempt: Attempt) -> None:
                try:
                    event = await attempt.receive()
                except (MeshError, GenerationError) as exc:
                    result.failures.append((attempt, exc))
                    return
                if result.winner is None:
                    result.winner, result.event = attempt, event
                    nursery.cancel_scope.cancel()
                else:
                    result.wasted_tokens += len(event.token_ids)

            for attempt in attempts:
                nursery.start_soon(read, attempt)
    except* trio.Cancelled:
        if result.winner is None:
            raise  # else the event was read in the very tick of the cancellation, which meets the next checkpoint
    return result
