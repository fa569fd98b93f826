"""Usage that nodes count, keep and tell each other."""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import msgpack
import pytest
import trio

from mesh.counters_wire import Totals
from mesh.errors import MalformedDatagram, PeerUnavailable
from nodes.access.usage import COMPARE_INTERVAL_S, DAY_S, DAYS_KEPT, FLUSH_INTERVAL_S, ROWS_PER_MESSAGE, UsageLog
from nodes.store import Store, UsageRow, open_store
from tests.unit.fake_peers import FakePeers
from tests.unit.memory_store import MemoryStore

DAY = 20_000
ONE = Totals(1, 10, 5)


class Nodes:
    def __init__(self, stores: Mapping[str, Store | MemoryStore]) -> None:
        self.stores = stores
        self.peers = FakePeers(*stores)
        self.peers.digests = dict.fromkeys(stores, "equal")
        self.wall_time = DAY * DAY_S + 100.0
        self.generation = 1
        self.logs = {
            name: UsageLog(
                store,  # type: ignore[arg-type]
                node_id=name,
                generation=lambda: self.generation,
                view=lambda name=name: self.peers.view_of(name),  # type: ignore[misc]
                ask=self.peers.asker_of(name),
                wall_clock=lambda: self.wall_time,
                rng=random.Random(name),
            )
            for name, store in stores.items()
        }
        self.peers.answerers = {name: log.answer for name, log in self.logs.items()}

    async def sums(self, name: str) -> dict[tuple[int, str, str], Totals]:
        return {(s.day, s.key, s.model): s.totals for s in await self.stores[name].usage_sums(0, 10**6)}


@asynccontextmanager
async def nodes(*names: str) -> AsyncIterator[Nodes]:
    made = Nodes({name: MemoryStore() for name in names})
    async with trio.open_nursery() as nursery:
        for log in made.logs.values():
            await nursery.start(log.run)
        yield made
        nursery.cancel_scope.cancel()


async def test_what_is_counted_is_on_every_disk_within_two_seconds(autojump_clock: trio.testing.MockClock) -> None:
    async with nodes("a", "b", "c") as mesh:
        mesh.logs["a"].count("k", "m", ONE)
        mesh.logs["a"].count("k", "m", ONE)
        mesh.logs["b"].count("k", "m", ONE)
        mesh.logs["b"].count("k", "n", ONE)
        await trio.sleep(2 * FLUSH_INTERVAL_S)
        for name in "abc":
            assert await mesh.sums(name) == {(DAY, "k", "m"): Totals(3, 30, 15), (DAY, "k", "n"): ONE}


async def test_a_full_disk_loses_nothing_and_is_told_of_once(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with nodes("a") as mesh:
        store = mesh.stores["a"]
        assert isinstance(store, MemoryStore)
        store.is_full = True
        for _ in range(5):
            mesh.logs["a"].count("k", "m", ONE)
            await trio.sleep(FLUSH_INTERVAL_S)
        store.is_full = False
        await trio.sleep(2 * FLUSH_INTERVAL_S)
        assert await mesh.sums("a") == {(DAY, "k", "m"): Totals(5, 50, 25)}
    assert [record.message for record in caplog.records] == ["usage cannot be kept", "usage is kept again"]


async def test_rows_beyond_what_memory_holds_are_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("nodes.access.usage.ROWS_MAX", 2)
    log = Nodes({"a": MemoryStore()}).logs["a"]
    for key in ("k", "l", "m", "k", "n"):
        log.count(key, "model", ONE)
    assert [record.message for record in caplog.records] == ["usage is not counted: too many rows wait for the disk"]


async def test_days_are_told_apart_and_yesterday_stays(autojump_clock: trio.testing.MockClock) -> None:
    async with nodes("a") as mesh:
        mesh.logs["a"].count("k", "m", ONE)
        await trio.sleep(2 * FLUSH_INTERVAL_S)
        mesh.wall_time += DAY_S
        for _ in range(2):
            mesh.logs["a"].count("k", "m", ONE)
            await trio.sleep(2 * FLUSH_INTERVAL_S)
        assert await mesh.sums("a") == {(DAY, "k", "m"): ONE, (DAY + 1, "k", "m"): Totals(2, 20, 10)}


async def test_lives_add_up_on_a_real_disk(tmp_path: Path) -> None:
    for generation in (1, 2):
        async with open_store(tmp_path) as store:
            mesh = Nodes({"a": store})
            mesh.generation = generation
            mesh.logs["a"].count("k", "m", ONE)
            await mesh.logs["a"].flush()
    async with open_store(tmp_path) as store:
        assert await Nodes({"a": store}).sums("a") == {(DAY, "k", "m"): Totals(2, 20, 10)}


async def test_a_node_that_was_away_learns_what_it_missed_also_of_the_dead(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with nodes("a", "b", "c") as mesh:
        await trio.sleep(2 * FLUSH_INTERVAL_S)
        away = {frozenset(("a", "c")), frozenset(("b", "c"))}
        mesh.peers.cut |= away
        await trio.sleep(2 * FLUSH_INTERVAL_S)
        for name in "ab":
            for i in range(ROWS_PER_MESSAGE + 10):
                mesh.logs[name].count(f"key-{i}", "m", ONE)
        await trio.sleep(2 * FLUSH_INTERVAL_S)
        mesh.peers.cut = {frozenset(("a", "b")), frozenset(("a", "c"))}  # a is gone, c is back
        await trio.sleep(3 * FLUSH_INTERVAL_S)
        found = await mesh.sums("c")
        assert len(found) == ROWS_PER_MESSAGE + 10
        assert set(found.values()) == {Totals(2, 20, 10)}


async def test_what_a_message_lost_is_found_by_the_next_comparison(autojump_clock: trio.testing.MockClock) -> None:
    async with nodes("a", "b") as mesh:
        await trio.sleep(2 * FLUSH_INTERVAL_S)
        answer = mesh.peers.answerers.pop("b")
        mesh.logs["a"].count("k", "m", ONE)
        await trio.sleep(2 * FLUSH_INTERVAL_S)
        mesh.peers.answerers["b"] = answer
        assert await mesh.sums("b") == {}
        await trio.sleep(2 * COMPARE_INTERVAL_S)
        assert await mesh.sums("b") == {(DAY, "k", "m"): ONE}


async def test_the_last_second_is_kept_at_a_stop(autojump_clock: trio.testing.MockClock) -> None:
    async with nodes("a") as mesh:
        mesh.logs["a"].count("k", "m", ONE)
    assert await mesh.sums("a") == {(DAY, "k", "m"): ONE}


async def test_a_peer_that_never_answers_keeps_nothing_from_the_disk(autojump_clock: trio.testing.MockClock) -> None:
    async def never(question: bytes) -> bytes:
        await trio.sleep_forever()
        raise AssertionError

    async with nodes("a", "b", "c") as mesh:
        await trio.sleep(2 * FLUSH_INTERVAL_S)
        mesh.peers.answerers["b"] = never
        for requests in range(1, 4):
            mesh.logs["a"].count("k", "m", ONE)
            await trio.sleep(2 * FLUSH_INTERVAL_S)
            for name in "ac":  # and who answers is told all the same
                assert (await mesh.sums(name))[DAY, "k", "m"].requests == requests


async def test_a_peer_that_never_answers_is_told_one_thing_at_a_time(autojump_clock: trio.testing.MockClock) -> None:
    asked = 0

    async def never(question: bytes) -> bytes:
        nonlocal asked
        asked += 1
        await trio.sleep_forever()
        raise AssertionError

    async with nodes("a", "b") as mesh:
        await trio.sleep(2 * FLUSH_INTERVAL_S)
        mesh.peers.answerers["b"] = never
        for _ in range(4):
            mesh.logs["a"].count("k", "m", ONE)
            await trio.sleep(FLUSH_INTERVAL_S)
        assert asked == 1


async def test_a_disk_that_cannot_be_read_ends_nothing_and_is_compared_again_later(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with nodes("a", "b") as mesh:
        await mesh.stores["b"].put(usage=[UsageRow(DAY, "k", "m", "b", 1, ONE)])
        for store in mesh.stores.values():
            assert isinstance(store, MemoryStore)
            store.is_unreadable = True
        await trio.sleep(2 * COMPARE_INTERVAL_S)
        with pytest.raises(PeerUnavailable, match="cannot read its usage"):
            await mesh.logs["b"].answer(msgpack.packb([2]))
        assert "usage cannot be read" in {record.message for record in caplog.records}
        for store in mesh.stores.values():
            assert isinstance(store, MemoryStore)
            store.is_unreadable = False
        await trio.sleep(2 * COMPARE_INTERVAL_S)
        assert await mesh.sums("a") == {(DAY, "k", "m"): ONE}


async def test_days_that_are_too_old_are_deleted_and_not_taken_from_peers_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with nodes("a", "b") as mesh:
        kept, old = DAY + 1 - DAYS_KEPT, DAY - DAYS_KEPT
        for store in mesh.stores.values():
            await store.put(usage=[UsageRow(day, "k", "m", "c", 1, ONE) for day in (old - 1, old, kept)])
        await trio.sleep(2 * FLUSH_INTERVAL_S)
        await mesh.logs["a"].answer(msgpack.packb([1, [[old - 1, "k", "m", "c", 2, 1, 1, 1]]]))
        mesh.wall_time += DAY_S
        await trio.sleep(DAY_S)
        for name in "ab":
            assert list(await mesh.sums(name)) == [(kept, "k", "m")]
        mesh.logs["b"]._wall_clock = lambda: mesh.wall_time - 10 * DAY_S  # one whose clock is late tells of it again
        await mesh.stores["b"].put(usage=[UsageRow(old, "k", "m", "c", 1, ONE)])
        mesh.peers.asked.clear()
        await trio.sleep(2 * COMPARE_INTERVAL_S)
        assert ("a", "b") in mesh.peers.asked
        assert list(await mesh.sums("a")) == [(kept, "k", "m")]


@pytest.mark.parametrize(
    "question",
    [
        b"",
        b"\xc1",
        msgpack.packb([]),
        msgpack.packb([9]),
        msgpack.packb([1]),
        msgpack.packb([1, [[1, 2]]]),
        msgpack.packb([1, [[-1, "k", "m", "n", 1, 1, 1, 1]]]),
        msgpack.packb([1, [[DAY, "k", "m", "n", 1, 1, 1, 2**60]]]),
        msgpack.packb([3, DAY, ["k"]]),
        msgpack.packb([3, "day", None]),
    ],
)
async def test_rubbish_from_a_peer_is_refused_and_changes_nothing(question: bytes) -> None:
    mesh = Nodes({"a": MemoryStore()})
    await mesh.stores["a"].put(usage=[UsageRow(DAY, "k", "m", "a", 1, ONE)])
    with pytest.raises(MalformedDatagram):
        await mesh.logs["a"].answer(question)
    assert await mesh.sums("a") == {(DAY, "k", "m"): ONE}
