"""The database under a node: what was acknowledged is there, whole, after whatever happened."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.counters_wire import Totals
from mesh.replica import Record, Replica
from nodes import store as store_module
from nodes.config import ConfigInvalid
from nodes.durable_replica import DurableReplica
from nodes.store import (
    APPLICATION_ID,
    FILE_NAME,
    TEXT_BYTES_MAX,
    DayDigest,
    Store,
    StoreFailed,
    UsageRow,
    UsageSum,
    holds_records,
    open_store,
)
from tests.unit.test_replica import records

DAY = 20_000  # since 1970


def live(record_id: str, clock: int, value: bytes = b"v") -> Record:
    return Record(record_id, clock, "w", 1, value)


async def test_what_was_put_is_there_after_a_reopening(tmp_path: Path) -> None:
    kept = [live("k1", 1), Record("k2"), live("k3", 2**63 - 1, bytes(1024)), live("ключ", 1, b"")]
    usage = [UsageRow(DAY, "key", "model", "n", 3, Totals(5, 2**53, 7))]
    async with open_store(tmp_path) as store:
        await store.put(kept, usage)
    async with open_store(tmp_path) as store:
        assert sorted(await store.records(), key=lambda r: r.record_id) == kept
        assert await store.usage_rows(DAY, None, 10) == usage


async def test_what_is_held_is_told_without_a_trace(tmp_path: Path) -> None:
    assert not holds_records(tmp_path, "k")
    async with open_store(tmp_path) as store:
        await store.put([live("k_1", 1), Record("x")])
        assert holds_records(tmp_path, "k_")
    before = sorted(tmp_path.iterdir())
    assert [holds_records(tmp_path, prefix) for prefix in ("k_1", "x", "kx", "K")] == [True, True, False, False]
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / FILE_NAME).write_bytes(b"no database" * 100)
    assert not holds_records(tmp_path, "k")


async def test_only_the_owner_may_read_the_database(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        await store.put([live("k", 1)])
        for file in tmp_path.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


async def test_each_transaction_waits_for_the_disk(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        pragmas = [store_module._pragma(store._connection, name) for name in ("journal_mode", "synchronous")]
        assert pragmas == ["wal", 2]


@settings(max_examples=25)
@given(st.lists(records, max_size=12))
def test_the_database_merges_as_a_replica_does(history: list[Record]) -> None:
    connection = sqlite3.connect(":memory:")
    connection.executescript(store_module._SCHEMA)
    for record in history:
        connection.execute(store_module._PUT_RECORD, store_module._record_row(record))
    rows = connection.execute("SELECT id, deleted, clock, writer, generation, value FROM records")
    expected = Replica("me", 1, history).records
    assert {row[0]: row for row in rows} == {i: (i, *record.rank) for i, record in expected.items()}
    connection.close()


async def test_usage_of_one_life_keeps_its_maximum_and_lives_are_apart(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        for generation, total in ((1, 5), (1, 3), (2, 4)):
            await store.put(usage=[UsageRow(DAY, "k", "m", "n", generation, Totals(total, total, 10 - total))])
        assert await store.usage_rows(DAY, None, 10) == [
            UsageRow(DAY, "k", "m", "n", 1, Totals(5, 5, 7)),
            UsageRow(DAY, "k", "m", "n", 2, Totals(4, 4, 6)),
        ]
        assert await store.usage_sums(DAY, DAY) == [UsageSum(DAY, "k", "m", Totals(9, 9, 13))]
        assert await store.usage_digests(0) == [DayDigest(DAY, 2, 9, 22)]


async def test_usage_is_read_in_pages_and_by_day_and_key(tmp_path: Path) -> None:
    rows = [
        UsageRow(day, key, model, node, 1, Totals(1, 2, 3))
        for day in (DAY, DAY + 1)
        for key in ("a", "b")
        for model in ("m", "n")
        for node in ("x", "y")
    ]
    async with open_store(tmp_path) as store:
        await store.put(usage=rows)
        read: list[UsageRow] = []
        while page := await store.usage_rows(DAY, read[-1].identity[1:] if read else None, 3):
            read += page
        assert read == rows[:8]
        sums = await store.usage_sums(DAY + 1, DAY + 9, "b")
        assert sums == [UsageSum(DAY + 1, "b", model, Totals(2, 4, 6)) for model in ("m", "n")]
        assert [digest.day for digest in await store.usage_digests(DAY + 1)] == [DAY + 1]


async def test_a_long_text_in_usage_is_refused(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        with pytest.raises(ValueError, match=f"exceeds {TEXT_BYTES_MAX}"):
            await store.put([live("k", 1)], [UsageRow(DAY, "k", "m" * (TEXT_BYTES_MAX + 1), "n", 1, Totals())])
        assert await store.records() == []


@asynccontextmanager
async def counted_batches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Store, list[int]]]:
    """A store whose first write waits until the test lets it go on; and how many puts each transaction held."""
    sizes: list[int] = []
    write = Store._write

    def counting(self: Store, puts: list[store_module._Put]) -> None:
        assert threading.current_thread() is not threading.main_thread()
        sizes.append(len(puts))
        write(self, puts)

    monkeypatch.setattr(Store, "_write", counting)
    async with open_store(folder) as store:
        yield store, sizes


async def test_puts_that_come_together_share_a_transaction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with counted_batches(tmp_path, monkeypatch) as (store, sizes):
        async with store._writing, trio.open_nursery() as nursery:  # as if one were being written
            for i in range(50):
                nursery.start_soon(store.put, [live(f"k{i}", 1)])
            await trio.testing.wait_all_tasks_blocked()
            assert sizes == []
            store._writing.release()
            await trio.testing.wait_all_tasks_blocked(0.01)
            while store._writing.locked():
                await trio.sleep(0.001)
            await store._writing.acquire()
        assert sum(sizes) == 50
        assert len(sizes) == 1
        assert len(await store.records()) == 50


async def test_no_put_counts_as_written_when_the_writer_could_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[str] = []

    async def put(store: Store, record_id: str) -> None:
        try:
            await store.put([live(record_id, 1)])
        except (RuntimeError, StoreFailed) as exc:
            outcomes.append(type(exc).__name__)
        else:
            outcomes.append("written")

    async def no_thread(*_: object, **__: object) -> None:
        await trio.sleep(0)
        monkeypatch.undo()
        raise RuntimeError("can't start new thread")

    async with open_store(tmp_path) as store:
        monkeypatch.setattr(trio.to_thread, "run_sync", no_thread)
        async with trio.open_nursery() as nursery:
            for record_id in ("one", "two", "three"):
                nursery.start_soon(put, store, record_id)
        found = {record.record_id for record in await store.records()}
    assert outcomes.count("written") == len(found)
    assert "RuntimeError" in outcomes


async def test_a_put_that_has_begun_ends_before_its_cancellation(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        durable = DurableReplica(Replica("me", 1), store)
        draft = durable.replica.draft("k", b"v")
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(durable.commit, [draft])
                await trio.testing.wait_all_tasks_blocked(0.0)
                scope.cancel()
        assert await store.records() == list(durable.replica.records.values()) == [draft]
        with trio.CancelScope() as scope:
            scope.cancel()
            await durable.commit([durable.replica.draft("l", b"v")])
        assert await store.records() == [draft]


# A full disk.


async def test_an_edit_for_which_there_is_no_room_is_refused_and_nothing_of_it_is_there(tmp_path: Path) -> None:
    async with open_store(tmp_path, pages_max=40) as store:
        durable = DurableReplica(Replica("me", 1), store)
        acknowledged: list[Record] = []

        async def fill() -> None:
            for i in range(300):
                drafts = [durable.replica.draft(f"{side}{i}", bytes(1024)) for side in "ab"]
                await durable.commit(drafts)
                acknowledged.extend(drafts)

        with pytest.raises(StoreFailed, match=rf"{FILE_NAME}: not kept, .*full; free space"):
            await fill()
        assert len(acknowledged) > 20
        assert list(durable.replica.records.values()) == acknowledged
        assert {r.record_id for r in await store.records()} == {r.record_id for r in acknowledged}
        tombstone = durable.replica.draft_deletion("a0")
        await durable.commit([tombstone])  # what takes no room is still taken
    async with open_store(tmp_path) as store:
        assert set(await store.records()) == {tombstone, *acknowledged[1:]}
        await store.put([live("more", 1, bytes(1024))])  # with room again


async def test_usage_leaves_room_for_edits_of_keys(tmp_path: Path) -> None:
    def row(i: int, requests: int = 1) -> UsageRow:
        return UsageRow(DAY + i // 50, f"{i:0200}", "m", "n", 1, Totals(requests))

    async with open_store(tmp_path, pages_max=80) as store:
        counted = 0

        async def fill() -> None:
            nonlocal counted
            while True:
                await store.put(usage=[row(counted)])
                counted += 1

        with pytest.raises(StoreFailed, match=rf"{FILE_NAME}: not kept, usage has filled its share, 75% of 80 pages"):
            await fill()
        await store.put(usage=[row(i, 2) for i in range(counted)])  # what is there may rise
        assert sum(s.totals.requests for s in await store.usage_sums(0, 2 * DAY)) == 2 * counted
        for i in range(30):
            await store.put([live(f"k{i}", 1, bytes(256))])
        await store.delete_usage(DAY + 2)
        assert min(digest.day for digest in await store.usage_digests(0)) == DAY + 2
        await store.put(usage=[row(counted)])  # with room again


async def test_one_put_that_is_too_large_does_not_refuse_those_beside_it(tmp_path: Path) -> None:
    outcomes: dict[str, bool] = {}
    async with open_store(tmp_path, pages_max=40) as store:

        async def put(name: str, count: int) -> None:
            try:
                await store.put([live(f"{name}{i}", 1, bytes(1024)) for i in range(count)])
                outcomes[name] = True
            except StoreFailed:
                outcomes[name] = False

        async with trio.open_nursery() as nursery:
            for name, count in (("a", 2), ("large", 400), ("b", 2), ("c", 2)):
                nursery.start_soon(put, name, count)
        assert outcomes == {"a": True, "large": False, "b": True, "c": True}
        assert len(await store.records()) == 6


async def test_what_peers_sent_while_the_disk_was_full_counts_and_is_kept_later(tmp_path: Path) -> None:
    async with open_store(tmp_path, pages_max=20) as store:
        durable = DurableReplica(Replica("me", 1), store)
        sent = [live(f"k{i}", 1, bytes(1024)) for i in range(60)]
        with pytest.raises(StoreFailed):
            await durable.keep(durable.replica.merge(sent))
        assert len(durable.replica.records) == 60
        store_module._pragma(store._connection, "max_page_count = 1000")
        await durable.keep(durable.replica.merge([Record("k1")]))
        assert len(await store.records()) == 60
        assert Record("k1") in await store.records()
        await durable.keep([])


# A disk that cannot be read.


async def test_what_cannot_be_read_after_the_start_is_no_fault_of_the_configuration(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        await store.put([live("k", 1)])
        store._connection.execute("DROP TABLE usage")
        for read in (store.usage_sums(0, DAY), store.usage_digests(0), store.usage_rows(DAY, None, 10)):
            with pytest.raises(StoreFailed, match=rf"{FILE_NAME}: not read, no such table.*check the disk"):
                await read
        assert await store.records() == [live("k", 1)]  # what is not damaged goes on


# Files that are no database of ours.


async def open_and_close(folder: Path) -> None:
    async with open_store(folder) as store:
        await store.records()


def foreign(file: Path) -> None:
    connection = sqlite3.connect(file)
    connection.execute("CREATE TABLE bookmarks (url TEXT)")
    connection.commit()
    connection.close()


def later(file: Path) -> None:
    connection = sqlite3.connect(file)
    connection.executescript(f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = 9;")
    connection.close()


def zeros(file: Path) -> None:
    file.write_bytes(bytes(8192))


def words(file: Path) -> None:
    file.write_text("not a database, and longer than the hundred bytes of a header. " * 10)


def folder_there(file: Path) -> None:
    file.mkdir()


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (foreign, "is a database of another program; move it away"),
        (later, "has schema version 9, this AI Cluster knows 1"),
        (words, "cannot be read: file is not a database; restore it from a backup, or move it and its -wal and -shm"),
        (zeros, "cannot be read: file is not a database"),
        (folder_there, "Is a directory; give a writable folder with --data-dir"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
async def test_a_file_that_is_no_database_of_ours_is_named_with_a_fix_and_left_alone(
    tmp_path: Path, make: object, complaint: str
) -> None:
    file = tmp_path / FILE_NAME
    assert callable(make)
    make(file)
    before = None if file.is_dir() else file.read_bytes()
    with pytest.raises(ConfigInvalid, match=re.escape(f"{file}") + ".*" + re.escape(complaint)):
        await open_and_close(tmp_path)
    assert file.is_dir() or file.read_bytes() == before


async def test_a_file_that_another_program_holds_is_named_and_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "BUSY_TIMEOUT_S", 0.01)
    other = sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(ConfigInvalid, match=rf"{FILE_NAME}: database is locked; .*end other programs that use"):
        await open_and_close(tmp_path)
    other.execute("ROLLBACK")
    async with open_store(tmp_path) as store:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreFailed, match=r"not kept, database is locked; .*end other programs"):
            await store.put([live("k", 1)])
        other.execute("ROLLBACK")
        await store.put([live("k", 1)])
    other.close()


async def test_an_empty_file_becomes_a_database(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).touch()
    await open_and_close(tmp_path)
    await open_and_close(tmp_path)


@pytest.mark.parametrize("seed", range(5))
async def test_a_damaged_database_is_named_with_a_fix(tmp_path: Path, seed: int) -> None:
    kept = [live(f"k{i:03}", 1, b"%d" % i * 100) for i in range(200)]
    async with open_store(tmp_path) as store:
        await store.put(kept)
    file = tmp_path / FILE_NAME
    damaged = bytearray(file.read_bytes())
    rng = Random(seed)
    at = 4096 * rng.randrange(1, len(damaged) // 4096)
    damaged[at : at + 512] = rng.randbytes(512)
    file.write_bytes(damaged)
    with pytest.raises(ConfigInvalid, match=r"cannot be read: .*restore it from a backup"):
        await open_and_close(tmp_path)


# SIGKILL.


def test_nothing_acknowledged_is_lost_by_a_kill_at_any_moment(tmp_path: Path) -> None:
    """Each life opens what the former ones left, commits pairs of records from several tasks, and is killed."""
    rng = Random(20)
    acknowledged: dict[str, tuple[int, bool]] = {}  # by id: the greatest clock, and if it is deleted
    counted: dict[tuple[int, str], int] = {}

    def acknowledge(life: int, line: str) -> None:
        *drafts, usage = line.split()
        task, number = usage.split(":")
        counted[life, f"task {task}"] = int(number)
        for draft in drafts:
            record_id, clock, is_deleted = draft.split(":")
            was_deleted = acknowledged.get(record_id, (0, False))[1]
            acknowledged[record_id] = (int(clock), was_deleted or is_deleted == "1")

    with subprocess.Popen(
        [sys.executable, "-m", "tests.unit.store_writer", str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as nursery:
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        for life in range(1, 21):
            nursery.stdin.write(f"{life}\n")
            nursery.stdin.flush()
            word, pid = nursery.stdout.readline().split()
            assert word == "open"
            for _ in range(rng.randrange(10)):
                acknowledge(life, nursery.stdout.readline())
            time.sleep(rng.random() * 0.01)  # the moment of a kill is of the real clock
            os.kill(int(pid), signal.SIGKILL)
            while (line := nursery.stdout.readline()) != f"killed by {signal.SIGKILL:d}\n":
                acknowledge(life, line)
            check(tmp_path, acknowledged, counted)
        nursery.stdin.close()
        assert nursery.wait(10) == 0
    assert len(counted) > 20


def check(folder: Path, acknowledged: dict[str, tuple[int, bool]], counted: dict[tuple[int, str], int]) -> None:
    async def read() -> tuple[dict[str, Record], dict[tuple[int, str], int]]:
        async with open_store(folder) as store:
            kept = {record.record_id: record for record in await store.records()}
            rows = await store.usage_rows(DAY, None, 1_000_000)
            return kept, {(row.generation, row.key): row.totals.requests for row in rows}

    kept, usage = trio.run(read)
    for record_id, (clock, is_deleted) in acknowledged.items():
        record = kept[record_id]
        assert record.is_deleted or (record.clock >= clock and not is_deleted), record_id
    for record_id, record in kept.items():
        other = kept[("b" if record_id[0] == "a" else "a") + record_id[1:]]
        assert record.value == other.value, "a commit of two records is there whole or not at all"
    for row, requests in counted.items():
        assert usage[row] >= requests
