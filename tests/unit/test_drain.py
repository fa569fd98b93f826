"""The steps of a drain over parts that note what is asked of them, on a clock that jumps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from nodes.drain import DRAIN_FINISH_SHARE, DRAIN_POLL_S, MOVE_INTERVAL_S, Drain
from nodes.peer_operations import OperationFailed

DRAIN_S = 30.0
NOTICE_S = 1.0


class Parts:
    """The HTTP server, the dispatch and the peer server of a node; `asked` is what each was told, and when."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, float]] = []
        self.is_in_use = True
        self.requests = 0
        self.has_idle = False
        self.active = 0
        self.started = trio.current_time()
        self.hurried = trio.Event()
        parts: Any = self
        self.drain = Drain(
            parts,
            parts,
            parts,
            active_requests=lambda: self.active,
            changed=lambda: self._note("changed"),
            drain_s=DRAIN_S,
            notice_s=NOTICE_S,
        )

    def _note(self, what: str) -> None:
        self.asked.append((what, round(trio.current_time() - self.started, 1)))

    def announce_drain(self) -> None:
        self._note("announce")

    def end_drain(self) -> None:
        self._note("end")

    def close_listener(self) -> None:
        if "close_listener" not in self.names:
            self._note("close_listener")

    def close_idle(self, idle_s: float) -> None:
        assert idle_s == NOTICE_S

    def statistics(self) -> Any:
        return SimpleNamespace(open_streams=self.requests)

    def move_all(self) -> int:
        self._note("move_all")
        return self.active

    def move_local(self) -> int:
        self._note("move_local")
        return 0

    @property
    def names(self) -> list[str]:
        return [what for what, _ in self.asked]

    async def leave(self) -> float:
        """The seconds it took."""
        await self.drain.leave(self.hurried)
        return trio.current_time() - self.started


async def test_a_node_without_clients_leaves_at_once(autojump_clock: trio.testing.MockClock) -> None:
    parts = Parts()
    parts.is_in_use = False
    assert await parts.leave() == 0
    assert parts.names == ["announce", "changed", "close_listener"]
    assert parts.drain.is_active


async def test_clients_are_told_before_connections_are_refused(autojump_clock: trio.testing.MockClock) -> None:
    parts = Parts()
    assert await parts.leave() == pytest.approx(NOTICE_S, abs=2 * DRAIN_POLL_S)
    assert parts.asked == [("announce", 0.0), ("changed", 0.0), ("close_listener", NOTICE_S)]


@pytest.mark.parametrize("held_by", ["requests", "active", "has_idle"])
async def test_it_lasts_as_long_as_something_runs_and_moves_answers_in_between(
    held_by: str, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    parts = Parts()
    setattr(parts, held_by, True)

    async def end() -> None:
        await trio.sleep(25)
        setattr(parts, held_by, False)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end)
        assert await parts.leave() == pytest.approx(25, abs=2 * DRAIN_POLL_S)
    moves = [at for what, at in parts.asked[3:] if what == "move_local"]
    assert moves[0] == DRAIN_S * DRAIN_FINISH_SHARE
    assert len(moves) == pytest.approx(5 / MOVE_INTERVAL_S, abs=1)  # those that nobody took are offered again
    assert parts.names[3:] == ["move_all", "move_local"] * len(moves)
    assert "are cut" not in caplog.text


async def test_what_still_runs_at_the_end_of_the_drain_time_is_cut(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    parts = Parts()
    parts.requests = 1
    assert await parts.leave() == pytest.approx(DRAIN_S, abs=2 * DRAIN_POLL_S)
    assert "are cut" in caplog.text


async def test_a_second_signal_ends_it_at_once(autojump_clock: trio.testing.MockClock) -> None:
    parts = Parts()
    parts.requests = 1
    parts.hurried.set()
    assert await parts.leave() == 0


async def test_a_drain_for_maintenance_refuses_nobody_and_is_undone(autojump_clock: trio.testing.MockClock) -> None:
    parts = Parts()
    parts.active = 2
    parts.drain.begin()
    parts.drain.begin()
    assert (parts.drain.is_active, parts.drain.running) == (True, 2)
    for _ in range(2):
        await trio.sleep(DRAIN_S)
        parts.drain.step()
    assert parts.names == ["announce", "changed", *["move_all", "move_local"] * 2]
    parts.drain.undo()
    parts.drain.undo()
    assert not parts.drain.is_active
    assert parts.names[6:] == ["end", "changed"]
    parts.drain.begin()
    parts.drain.step()
    assert parts.names[8:] == ["announce", "changed"]  # a time of its own


async def test_a_drained_node_may_leave_and_then_does_not_come_back(autojump_clock: trio.testing.MockClock) -> None:
    parts = Parts()
    parts.drain.begin()
    await trio.sleep(100)
    parts.requests = 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(parts.leave)
        await trio.sleep(DRAIN_S / 2)
        with pytest.raises(OperationFailed, match="start it again"):
            parts.drain.undo()
        parts.requests = 0
