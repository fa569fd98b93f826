"""What a node must not lose, in one SQLite database in its data directory: the replica's records, and usage.

What put() returned from is on disk (write-ahead log, synchronous FULL), and a put is there whole or not at all. Both
tables merge by the rules of mesh/replica.py and mesh/counters.py, so the order of puts does not matter, and writing
again what is there changes nothing. SQLite runs in a worker thread, one call at a time; trio never waits for the disk.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from mesh.counters_wire import Totals
from mesh.replica import Record
from nodes.config import ConfigInvalid
from nodes.data_directory import folder_fix

FILE_NAME = "cluster.sqlite3"
APPLICATION_ID = 0x41_49_43_4C  # "AICL" in the file's header: tells our database from others
SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 5.0  # the data directory's lock keeps other nodes out; a backup or a look with sqlite3 is short
PAGES_MAX = 262_144  # 1 GiB of 4 KiB pages: all ids a replica merges, and some 4 million rows of usage
# Of the pages, what usage may fill up to: what is above is for keys, which can be revoked however much was counted.
USAGE_SHARE = 0.75
TEXT_BYTES_MAX = 256  # of a key and of a model in a row of usage
DAY_MAX = 2_932_896  # days since 1970: the last one of the year 9999

_SCHEMA = f"""
CREATE TABLE records (
  id TEXT PRIMARY KEY, deleted INTEGER NOT NULL, clock INTEGER NOT NULL, writer TEXT NOT NULL,
  generation INTEGER NOT NULL, value BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE usage (
  day INTEGER NOT NULL, key TEXT NOT NULL, model TEXT NOT NULL, node_id TEXT NOT NULL, generation INTEGER NOT NULL,
  requests INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
  PRIMARY KEY (day, key, model, node_id, generation)
) WITHOUT ROWID;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""
_DISK_FIX = "free space on its disk, check the disk, end other programs that use the file"
# Text compares by its UTF-8 bytes, which is the order of Python's strings: this is Record.rank.
_PUT_RECORD = """
INSERT INTO records (id, deleted, clock, writer, generation, value) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET deleted = excluded.deleted, clock = excluded.clock, writer = excluded.writer,
  generation = excluded.generation, value = excluded.value
WHERE (excluded.deleted, excluded.clock, excluded.writer, excluded.generation, excluded.value)
  > (records.deleted, records.clock, records.writer, records.generation, records.value)
"""
_PUT_USAGE = """
INSERT INTO usage (day, key, model, node_id, generation, requests, prompt_tokens, completion_tokens)
VALUES (?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (day, key, model, node_id, generation) DO UPDATE SET requests = max(requests, excluded.requests),
  prompt_tokens = max(prompt_tokens, excluded.prompt_tokens),
  completion_tokens = max(completion_tokens, excluded.completion_tokens)
"""
_USAGE_PAGE = """
SELECT day, key, model, node_id, generation, requests, prompt_tokens, completion_tokens FROM usage
WHERE day = ? AND (key, model, node_id, generation) > (?, ?, ?, ?) ORDER BY key, model, node_id, generation LIMIT ?
"""


class StoreFailed(Exception):
    """The disk did not take a put, of which nothing is kept then, or did not give what was read. Earlier puts stay."""


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What one life of one node counted of one key and model on one day (since 1970, UTC). Its totals only rise."""

    day: int
    key: str
    model: str
    node_id: str
    generation: int
    totals: Totals

    @property
    def identity(self) -> tuple[int, str, str, str, int]:
        return (self.day, self.key, self.model, self.node_id, self.generation)


@dataclass(frozen=True, slots=True)
class UsageSum:
    """Over all nodes and their lives."""

    day: int
    key: str
    model: str
    totals: Totals


@dataclass(frozen=True, slots=True)
class DayDigest:
    """Of the rows of one day; two stores that hold the same have the same, and since rows only come and rise, two that
    do not have others."""

    day: int
    rows: int
    requests: int
    tokens: int


class _UsageFull(Exception):
    """Keys have the rest of the file."""


@dataclass(slots=True)
class _Put:
    record_rows: list[tuple[str, bool, int, str, int, bytes]]
    usage_rows: list[tuple[int, str, str, str, int, int, int, int]]
    is_done: bool = False
    error: BaseException | None = None


@asynccontextmanager
async def open_store(folder: Path, *, pages_max: int = PAGES_MAX) -> AsyncIterator[Store]:
    """The database in that folder, created if it is not there; closed at the end.

    Raises ConfigInvalid for a file that is damaged, of another program, or of a later version."""
    file = folder / FILE_NAME
    limiter = trio.CapacityLimiter(1)
    connection = await trio.to_thread.run_sync(_open, file, pages_max, limiter=limiter)
    try:
        yield Store(file, connection, limiter)
    finally:
        with trio.CancelScope(shield=True):  # bounded by BUSY_TIMEOUT_S
            await trio.to_thread.run_sync(connection.close, limiter=limiter)


class Store:
    """Made by open_store()."""

    def __init__(self, file: Path, connection: sqlite3.Connection, limiter: trio.CapacityLimiter) -> None:
        self._file = file
        self._connection = connection
        self._limiter = limiter
        self._writing = trio.Lock()
        self._waiting: list[_Put] = []

    async def records(self) -> list[Record]:
        """All that are kept. Raises ConfigInvalid for a damaged file."""
        return await trio.to_thread.run_sync(self._read_records, limiter=self._limiter)

    async def usage_sums(self, first_day: int, last_day: int, key: str | None = None) -> list[UsageSum]:
        """Of the days first..last, in order of days, keys, models. Raises StoreFailed."""
        return await trio.to_thread.run_sync(self._read_sums, first_day, last_day, key, limiter=self._limiter)

    async def usage_digests(self, first_day: int) -> list[DayDigest]:
        """Of each day since then that has rows. Raises StoreFailed."""
        return await trio.to_thread.run_sync(self._read_digests, first_day, limiter=self._limiter)

    async def usage_rows(self, day: int, after: tuple[str, str, str, int] | None, rows_max: int) -> list[UsageRow]:
        """The next ones of one day, in the order of their identities. Raises StoreFailed."""
        return await trio.to_thread.run_sync(self._read_usage, day, after, rows_max, limiter=self._limiter)

    async def delete_usage(self, before_day: int) -> None:
        """All rows of earlier days, day after day, so that others are served in between. Raises StoreFailed; the days
        that were deleted till then are gone."""
        while await trio.to_thread.run_sync(self._delete_oldest, before_day, limiter=self._limiter):
            pass

    async def put(self, records: Sequence[Record] = (), usage: Sequence[UsageRow] = ()) -> None:
        """On disk, all of it, when this returns. Puts that come while another is written share the next transaction.

        Raises StoreFailed, and nothing of this put is kept; rows of usage that are new are refused so where usage has
        filled its share, USAGE_SHARE. Once begun it is not cancelled: the caller must know.
        Raises ValueError for a row of usage whose texts are too long."""
        await trio.lowlevel.checkpoint_if_cancelled()
        put = _Put([_record_row(record) for record in records], [_usage_row(row) for row in usage])
        self._waiting.append(put)
        with trio.CancelScope(shield=True):  # bounded: at most the put under way, then this one
            async with self._writing:
                if not put.is_done:
                    puts, self._waiting = self._waiting, []
                    try:
                        await trio.to_thread.run_sync(self._write_all, puts, limiter=self._limiter)
                    except BaseException as exc:  # no thread, no memory: nobody's put may count as written
                        for unwritten in puts:
                            if not unwritten.is_done:
                                unwritten.error, unwritten.is_done = exc, True
                        raise
        assert put.is_done
        if isinstance(put.error, _UsageFull):
            raise StoreFailed(f"{self._file}: not kept, {put.error}") from put.error
        if put.error is not None:
            raise StoreFailed(f"{self._file}: not kept, {put.error}; {_DISK_FIX}, and try again") from put.error

    # In the worker thread.

    def _write_all(self, puts: list[_Put]) -> None:
        """Together, or, where that fails, each for itself: one that is too large is no reason to refuse the others."""
        try:
            self._write(puts)
        except Exception as exc:  # whatever it is, each put must hear of it
            if len(puts) == 1:
                puts[0].error = exc
            else:
                for put in puts:
                    self._write_all([put])
        for put in puts:
            put.is_done = True

    def _write(self, puts: list[_Put]) -> None:
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            for put in puts:
                connection.executemany(_PUT_RECORD, put.record_rows)
                if put.usage_rows:
                    pages_before = self._pages_used()
                    connection.executemany(_PUT_USAGE, put.usage_rows)
                    self._check_usage_share(pages_before)
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")

    def _pages_used(self) -> int:
        return _count(self._connection, "page_count") - _count(self._connection, "freelist_count")

    def _check_usage_share(self, pages_before: int) -> None:
        """Raises _UsageFull where usage has grown beyond it."""
        pages, pages_max = self._pages_used(), _count(self._connection, "max_page_count")
        if pages > pages_before and pages > USAGE_SHARE * pages_max:
            raise _UsageFull(
                f"usage has filled its share, {USAGE_SHARE:.0%} of {pages_max} pages; new rows are taken again when "
                f"old days are deleted, and there are fewer with fewer keys, models and restarts"
            )

    def _delete_oldest(self, before_day: int) -> bool:
        """False where there is no earlier day."""
        with _naming_failed(self._file, "not deleted"):
            day: int | None = self._connection.execute("SELECT min(day) FROM usage").fetchone()[0]
            if day is None or day >= before_day:
                return False
            self._connection.execute("DELETE FROM usage WHERE day = ?", (day,))
            return True

    def _read_records(self) -> list[Record]:
        with _naming(self._file):
            rows = self._connection.execute("SELECT id, deleted, clock, writer, generation, value FROM records")
            return [
                Record(record_id) if deleted else Record(record_id, clock, writer, generation, value)
                for record_id, deleted, clock, writer, generation, value in rows
            ]

    def _read_sums(self, first_day: int, last_day: int, key: str | None) -> list[UsageSum]:
        with _naming_failed(self._file, "not read"):
            rows = self._connection.execute(
                "SELECT day, key, model, sum(requests), sum(prompt_tokens), sum(completion_tokens) FROM usage "
                "WHERE day BETWEEN ? AND ? AND (? IS NULL OR key = ?) GROUP BY 1, 2, 3 ORDER BY 1, 2, 3",
                (first_day, last_day, key, key),
            )
            return [UsageSum(day, of_key, model, Totals(*totals)) for day, of_key, model, *totals in rows]

    def _read_digests(self, first_day: int) -> list[DayDigest]:
        with _naming_failed(self._file, "not read"):
            rows = self._connection.execute(
                "SELECT day, count(*), sum(requests), sum(prompt_tokens + completion_tokens) FROM usage "
                "WHERE day >= ? GROUP BY day ORDER BY day",
                (first_day,),
            )
            return [DayDigest(*row) for row in rows]

    def _read_usage(self, day: int, after: tuple[str, str, str, int] | None, rows_max: int) -> list[UsageRow]:
        with _naming_failed(self._file, "not read"):
            rows = self._connection.execute(
                _USAGE_PAGE,
                (day, *(after or ("", "", "", -1)), rows_max),
            )
            return [
                UsageRow(of_day, key, model, node_id, generation, Totals(*totals))
                for of_day, key, model, node_id, generation, *totals in rows
            ]


def _record_row(record: Record) -> tuple[str, bool, int, str, int, bytes]:
    return (record.record_id, *record.rank)


def _usage_row(row: UsageRow) -> tuple[int, str, str, str, int, int, int, int]:
    for value in (row.key, row.model, row.node_id):
        if len(value.encode()) > TEXT_BYTES_MAX:
            raise ValueError(f"a text of {len(value.encode())} bytes in a row of usage exceeds {TEXT_BYTES_MAX}")
    totals = row.totals
    return (*row.identity, totals.requests, totals.prompt_tokens, totals.completion_tokens)


def check_store(folder: Path) -> None:
    """Raises ConfigInvalid where open_store() would; changes nothing, and a running node may have it open."""
    file = folder / FILE_NAME
    if not file.exists():
        return
    if not os.access(file, os.R_OK | os.W_OK):
        raise ConfigInvalid(f"{file}: {os.strerror(errno.EACCES)}; give a writable folder with --data-dir")
    with _naming(file), closing(_look_into(file)) as connection:
        _check_ours(connection, file)
        _check_whole(connection, file)


def holds_records(folder: Path, prefix: str) -> bool:
    """Whether a record is kept whose id begins with it, deleted or not; changes nothing, as check_store(). False also
    where the file cannot be read, of which open_store() says why."""
    file = folder / FILE_NAME
    try:
        with closing(_look_into(file)) as connection:
            found = connection.execute("SELECT 1 FROM records WHERE substr(id, 1, length(?1)) = ?1 LIMIT 1", (prefix,))
            return found.fetchone() is not None
    except sqlite3.Error:
        return False


def _look_into(file: Path) -> sqlite3.Connection:
    """To read only. Who reads a database that nobody has open in the usual way leaves files of its own beside it."""
    is_open = file.with_name(file.name + "-wal").exists()
    address = f"{file.absolute().as_uri()}?{'mode=ro' if is_open else 'immutable=1'}"
    return sqlite3.connect(address, timeout=BUSY_TIMEOUT_S, uri=True)


def _open(file: Path, pages_max: int) -> sqlite3.Connection:
    try:
        os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))  # hashes of keys are nobody else's business
    except OSError as exc:
        raise ConfigInvalid(f"{file}: {exc.strerror}; {folder_fix(exc, '--data-dir')}") from exc
    # Calls come from several worker threads, but never two at a time.
    connection = sqlite3.connect(file, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        with _naming(file):
            _prepare(connection, file, pages_max)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, file: Path, pages_max: int) -> None:
    """Raises ConfigInvalid; a file that is not ours is as it was."""
    schema_version = _check_ours(connection, file)
    _pragma(connection, "journal_mode = WAL")  # where the file system has none, a rollback journal is as durable
    _pragma(connection, "synchronous = FULL")
    _pragma(connection, f"max_page_count = {pages_max}")
    if schema_version == 0:
        connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
    _check_whole(connection, file)


def _check_ours(connection: sqlite3.Connection, file: Path) -> object:
    """The version of its schema, 0 for a new file. Raises ConfigInvalid."""
    application_id = _pragma(connection, "application_id")
    has_tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] > 0
    if application_id != APPLICATION_ID and (has_tables or application_id):
        raise ConfigInvalid(f"{file} is a database of another program; move it away, or give another --data-dir")
    schema_version = _pragma(connection, "user_version")
    if schema_version not in (0, SCHEMA_VERSION):
        raise ConfigInvalid(
            f"{file} has schema version {schema_version}, this AI Cluster knows {SCHEMA_VERSION}; run the later one"
        )
    return schema_version


def _check_whole(connection: sqlite3.Connection, file: Path) -> None:
    """Raises ConfigInvalid for a damaged file."""
    if (damage := _pragma(connection, "quick_check(1)")) != "ok":
        raise ConfigInvalid(_damaged(file, " ".join(str(damage).split())))


def _pragma(connection: sqlite3.Connection, pragma: str) -> object:
    row = connection.execute(f"PRAGMA {pragma}").fetchone()
    return row[0] if row else None


def _count(connection: sqlite3.Connection, pragma: str) -> int:
    count: int = connection.execute(f"PRAGMA {pragma}").fetchone()[0]
    return count


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Any complaint of SQLite as one line that names the file."""
    try:
        yield
    except sqlite3.Error as exc:
        if getattr(exc, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise ConfigInvalid(_damaged(file, str(exc))) from exc
        raise ConfigInvalid(f"{file}: {exc}; {_DISK_FIX}, or give another --data-dir") from exc


@contextmanager
def _naming_failed(file: Path, what: str) -> Iterator[None]:
    """Any complaint of SQLite to a node that runs, and goes on. what: did not happen."""
    try:
        yield
    except sqlite3.Error as exc:
        raise StoreFailed(f"{file}: {what}, {exc}; {_DISK_FIX}, and try again") from exc


def _damaged(file: Path, reason: str) -> str:
    return (
        f"{file} cannot be read: {reason}; restore it from a backup, or move it and its -wal and -shm files away: "
        f"the other nodes send their records again"
    )
