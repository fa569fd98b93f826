"""Replicas of several nodes that keep each other equal, with peers that come and go."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio

from mesh.errors import MalformedDatagram
from mesh.replica import Record, Replica
from nodes.access.record_sync import (
    COMPARISONS_MAX,
    FIRST_STEP_TIMEOUT_S,
    RETRY_S,
    SETTLE_S,
    WATCH_INTERVAL_S,
    RecordSync,
)
from nodes.durable_replica import DurableReplica
from nodes.store import StoreFailed, UsageRow
from tests.unit.fake_peers import FakePeers

SOON_S = SETTLE_S + RETRY_S + 5 * WATCH_INTERVAL_S


class FakeStore:
    def __init__(self) -> None:
        self.kept: list[Record] = []
        self.is_full = False

    async def put(self, records: Sequence[Record] = (), usage: Sequence[UsageRow] = ()) -> None:
        await trio.lowlevel.checkpoint()
        if self.is_full:
            raise StoreFailed("the disk is full")
        self.kept += records


class Nodes:
    def __init__(self, *names: str) -> None:
        self.peers = FakePeers(*names)
        self.stores = {name: FakeStore() for name in names}
        self.replicas = {name: Replica(name, 1) for name in names}
        self.syncs = {
            name: RecordSync(
                DurableReplica(self.replicas[name], self.stores[name]),  # type: ignore[arg-type]
                view=lambda name=name: self.peers.view_of(name),  # type: ignore[misc]
                ask=self.peers.asker_of(name),
                publish=self.peers.publisher_of(name),
                rng=random.Random(name),
            )
            for name in names
        }
        self.peers.answerers = {name: sync.answer for name, sync in self.syncs.items()}

    async def edit(self, name: str, record_id: str, value: bytes) -> dict[str, str]:
        return await self.syncs[name].commit([self.replicas[name].draft(record_id, value)])

    async def delete(self, name: str, record_id: str) -> dict[str, str]:
        return await self.syncs[name].commit([self.replicas[name].draft_deletion(record_id)])

    def values(self, record_id: str) -> list[bytes | None]:
        return [replica.value(record_id) for replica in self.replicas.values()]


@asynccontextmanager
async def nodes(*names: str) -> AsyncIterator[Nodes]:
    made = Nodes(*names)
    async with trio.open_nursery() as nursery:
        for sync in made.syncs.values():
            await nursery.start(sync.run)
        yield made
        nursery.cancel_scope.cancel()


async def test_an_edit_is_everywhere_and_on_every_disk_when_it_is_acknowledged(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with nodes("a", "b", "c") as mesh:
        assert await mesh.edit("a", "k", b"1") == {}
        assert mesh.values("k") == [b"1"] * 3
        assert all(len(store.kept) == 1 for store in mesh.stores.values())


async def test_a_node_that_was_cut_off_learns_everything_as_soon_as_it_is_seen(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with nodes("a", "b", "c", "d") as mesh:
        await mesh.edit("a", "k", b"1")
        sides = [frozenset((x, y)) for x in "ab" for y in "cd"]
        mesh.peers.cut.update(sides)
        assert await mesh.delete("a", "k") == {}  # dead members are not waited for
        await mesh.edit("c", "k", b"2")
        await mesh.edit("d", "m", b"3")
        assert mesh.values("k") == [None, None, b"2", b"2"]
        mesh.peers.cut.clear()
        await trio.sleep(SOON_S)
        assert mesh.values("k") == [None] * 4
        assert mesh.values("m") == [b"3"] * 4


async def test_a_peer_that_cannot_be_told_is_named_and_told_later(autojump_clock: trio.testing.MockClock) -> None:
    async with nodes("a", "b") as mesh:
        answer = mesh.peers.answerers.pop("b")
        assert list(await mesh.edit("a", "k", b"1")) == ["b"]
        mesh.peers.answerers["b"] = answer
        await trio.sleep(SOON_S)
        assert mesh.values("k") == [b"1", b"1"]


async def test_equal_replicas_ask_nothing(autojump_clock: trio.testing.MockClock) -> None:
    async with nodes("a", "b") as mesh:
        await mesh.edit("a", "k", b"1")
        await trio.sleep(SOON_S)
        mesh.peers.asked.clear()
        await trio.sleep(60.0)
        assert mesh.peers.asked == []
        assert all(sync.has_compared.is_set() for sync in mesh.syncs.values())


async def test_a_peer_whose_profile_was_not_heard_yet_is_not_compared_with(
    autojump_clock: trio.testing.MockClock,
) -> None:
    made = Nodes("a", "b")
    async with trio.open_nursery() as nursery:
        await nursery.start(made.syncs["a"].run)
        await trio.sleep(SOON_S)
        assert made.peers.digests.get("b", "") == ""
        assert not made.syncs["a"].has_compared.is_set()
        await nursery.start(made.syncs["b"].run)
        await trio.sleep(2 * WATCH_INTERVAL_S)
        assert made.syncs["a"].has_compared.is_set()
        nursery.cancel_scope.cancel()


def with_silent_peers(count: int) -> Nodes:
    """a knows nothing, b something, and `count` others that never answer have another digest than a."""

    async def never(question: bytes) -> bytes:
        await trio.sleep_forever()
        raise AssertionError

    silent = [f"s{index}" for index in range(count)]
    made = Nodes("a", "b", *silent)
    made.replicas["b"].merge([Record("k", 1, "w", 1, b"1")])
    made.peers.digests.update(dict.fromkeys(silent, "another"))
    made.peers.digests["b"] = made.replicas["b"].digest().hex()
    made.peers.answerers.update(dict.fromkeys(silent, never))
    return made


async def test_peers_that_never_answer_give_way_to_one_that_does(autojump_clock: trio.testing.MockClock) -> None:
    count = 3 * COMPARISONS_MAX
    made = with_silent_peers(count)
    async with trio.open_nursery() as nursery:
        await nursery.start(made.syncs["a"].run)
        with trio.fail_after(SOON_S + (count / COMPARISONS_MAX) * (FIRST_STEP_TIMEOUT_S + WATCH_INTERVAL_S)):
            await made.syncs["a"].has_compared.wait()
        assert made.replicas["a"].value("k") == b"1"
        assert all(made.peers.asked.count(("a", name)) <= 2 for name in made.peers.names if name != "b")
        nursery.cancel_scope.cancel()


async def test_who_answers_probes_is_asked_before_suspects(autojump_clock: trio.testing.MockClock) -> None:
    made = with_silent_peers(20)
    made.peers.suspects = {name for name in made.peers.names if name.startswith("s")}
    async with trio.open_nursery() as nursery:
        await nursery.start(made.syncs["a"].run)
        await trio.sleep(SETTLE_S + 3 * WATCH_INTERVAL_S)
        assert made.replicas["a"].value("k") == b"1"
        nursery.cancel_scope.cancel()


async def test_what_the_disk_refuses_is_not_edited(autojump_clock: trio.testing.MockClock) -> None:
    async with nodes("a", "b") as mesh:
        mesh.stores["a"].is_full = True
        with pytest.raises(StoreFailed):
            await mesh.edit("a", "k", b"1")
        await trio.sleep(SOON_S)
        assert mesh.values("k") == [None, None]


async def test_what_peers_say_holds_although_the_disk_refuses_it(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with nodes("a", "b") as mesh:
        mesh.stores["b"].is_full = True
        await mesh.edit("a", "k", b"1")
        assert mesh.values("k") == [b"1", b"1"]
        assert [record.message for record in caplog.records] == ["what peers say of keys cannot be kept"]
        mesh.stores["b"].is_full = False
        await mesh.edit("a", "m", b"2")
        assert {record.record_id for record in mesh.stores["b"].kept} == {"k", "m"}


async def test_ten_thousand_records_reach_a_new_node(autojump_clock: trio.testing.MockClock) -> None:
    made = Nodes("a", "b")
    made.replicas["a"].merge([Record(f"k{i}", i + 1, "w", 1, b"v" * 100) for i in range(10_000)])
    async with trio.open_nursery() as nursery:
        for sync in made.syncs.values():
            await nursery.start(sync.run)
        with trio.fail_after(60):
            await made.syncs["b"].has_compared.wait()
        assert made.replicas["b"].digest() == made.replicas["a"].digest()
        nursery.cancel_scope.cancel()


async def test_rubbish_from_a_peer_is_refused(autojump_clock: trio.testing.MockClock) -> None:
    async with nodes("a") as mesh:
        for question in (b"", b"\xc1", b"\x91\x63"):
            with pytest.raises(MalformedDatagram):
                await mesh.syncs["a"].answer(question)
