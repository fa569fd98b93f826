"""Of two generations the one that speaks first is kept, whatever is cancelled meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from mesh.errors import PeerUnavailable
from nodes.generation import GenerateEvent
from nodes.race import race


class Reading:
    """Speaks or fails at a time."""

    def __init__(self, at: float, text: str = "", error: Exception | None = None) -> None:
        self.at, self.event, self.error = at, GenerateEvent(text, (1, 2)), error
        self.reads = 0

    async def receive(self) -> GenerateEvent:
        await trio.sleep_until(self.at)
        if self.error is not None:
            raise self.error
        self.reads += 1
        return self.event


async def run(*attempts: Reading) -> Any:
    return await race(attempts)  # type: ignore[arg-type]


async def test_the_first_to_speak_wins(autojump_clock: trio.testing.MockClock) -> None:
    slow, fast = Reading(2.0, "slow"), Reading(1.0, "fast")
    result = await run(slow, fast)
    assert (result.winner, result.event.text, result.wasted_tokens) == (fast, "fast", 0)
    assert trio.current_time() == 1.0


async def test_who_fails_leaves_the_race_to_the_other(autojump_clock: trio.testing.MockClock) -> None:
    error = PeerUnavailable("gone")
    failing, slow = Reading(1.0, error=error), Reading(2.0, "slow")
    result = await run(failing, slow)
    assert (result.winner, result.failures) == (slow, [(failing, error)])
    both = await run(Reading(1.0, error=error), Reading(2.0, error=error))
    assert (both.winner, both.event, len(both.failures)) == (None, None, 2)


async def test_two_that_speak_at_once_cost_one_of_them(autojump_clock: trio.testing.MockClock) -> None:
    result = await run(Reading(1.0, "a"), Reading(1.0, "b"))
    assert result.wasted_tokens in (0, 2)
    assert result.winner is not None


@pytest.mark.parametrize("cancel_at", [0.5, 1.0, 1.5])
async def test_an_event_that_was_read_is_not_lost_to_a_cancellation(
    autojump_clock: trio.testing.MockClock, cancel_at: float
) -> None:
    attempts = Reading(1.0, "a"), Reading(5.0, "b")
    result = None
    with trio.move_on_at(cancel_at):
        result = await run(*attempts)
    assert (result is not None) == bool(attempts[0].reads)
