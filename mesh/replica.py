"""A map of small records that every node holds whole and any node edits: API keys. The last writer wins, and a
deletion always.

Versions. An edit's version is a Lamport clock, one more than the greatest this replica has seen, then the writer's id
and generation; of two records of one id the greater is kept, and where even versions are equal (a writer that lost its
data and reused one) the greater value. That is a total order, so merging is commutative, associative and idempotent.
It needs no wall clock: whoever edits a record that it has seen outdoes it. Edits made without knowledge of each other
are concurrent, and of those one wins whole, the same everywhere; a clock of the day would choose the later one, and let
a node whose clock is wrong win for years (docs/decisions/0007).

Deletion. A tombstone is the id alone, without a version: greater than every record of that id, whenever it was written,
equal to every other tombstone. Nothing brings the id back, whatever node rejoins after however long; so a secret that
must never work again is a record of its own, deleted, never a field that a concurrent edit might restore.

Bounds. No id is ever forgotten. An edit is refused beyond RECORDS_MAX records or IDS_MAX ids, deleted ones included;
deleting never is, since the id is there already. Merging goes on to IDS_MERGED_MAX ids, so that replicas which were
filled apart still become equal; there, ids not known yet are refused, deleted ones too, and since no place ever comes
free again, what was refused cannot come back either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import msgpack

from mesh.errors import MalformedDatagram, MeshError
from mesh.wire import COUNT_MAX, NODE_ID_BYTES_MAX, count, text

RECORD_ID_BYTES_MAX = 64
VALUE_BYTES_MAX = 1_024
RECORDS_MAX = 10_000  # with values of 200 bytes about 6 MB of memory
IDS_MAX = 65_536  # 18 years of ten new keys a day; some 300 bytes of memory each
IDS_MERGED_MAX = 4 * IDS_MAX  # four parts of a mesh, each filled while apart
BUCKETS = 64  # of ids by hash; one that differs holds some 1/64 of the records
DIGEST_BYTES = 16


class EditRefused(MeshError):
    """An edit that this replica does not make. Nothing has changed."""


@dataclass(frozen=True, slots=True)
class Record:
    """One id at one version. value None: deleted, and then there is no version.

    clock, writer, generation: the version; writer and generation say which life of which node made the edit."""

    record_id: str
    clock: int = 0
    writer: str = ""
    generation: int = 0
    value: bytes | None = None

    @property
    def is_deleted(self) -> bool:
        return self.value is None

    @property
    def rank(self) -> tuple[bool, int, str, int, bytes]:
        """Of two records of one id the greater is kept. The same order as the columns of nodes/store.py."""
        return (self.value is None, self.clock, self.writer, self.generation, self.value or b"")


def encode_record(record: Record) -> bytes:
    fields: list[object] = [record.record_id]
    if record.value is not None:
        fields += [record.clock, record.writer, record.generation, record.value]
    encoded: bytes = msgpack.packb(fields)
    return encoded


def read_record(fields: Any) -> Record:
    """From what encode_record() packed, unpacked. Raises MalformedDatagram; unknown trailing fields are ignored."""
    if not isinstance(fields, list) or not fields:
        raise MalformedDatagram(f"expected the array of a record, got a {type(fields).__name__}")
    record_id = text(fields[0], RECORD_ID_BYTES_MAX)
    if len(fields) == 1:
        return Record(record_id)
    if len(fields) < 5:
        raise MalformedDatagram(f"a record has 1 field or at least 5, not {len(fields)}")
    value = fields[4]
    if not isinstance(value, bytes) or len(value) > VALUE_BYTES_MAX:
        raise MalformedDatagram(f"a value is at most {VALUE_BYTES_MAX} bytes, got a {type(value).__name__}")
    return Record(record_id, count(fields[1]), text(fields[2], NODE_ID_BYTES_MAX), count(fields[3]), value)


def hash_record(record: Record) -> bytes:
    return hashlib.blake2b(encode_record(record), digest_size=DIGEST_BYTES).digest()


def bucket_of(record_id: str) -> int:
    return hashlib.blake2b(record_id.encode(), digest_size=1).digest()[0] % BUCKETS


@dataclass(frozen=True, slots=True)
class ReplicaStatistics:
    """refused: merged records that found no place (see Bounds)."""

    records: int
    tombstones: int
    refused: int


class Replica:
    """One node's copy.

    A local edit is drafted, put on disk, then merged: `record = replica.draft(...)`, `await store.put([record])`,
    `replica.merge([record])`. A draft changes nothing but the clock, so one that never reaches the disk is as if it
    had never been, and no peer hears of an edit that a crash could take back."""

    def __init__(
        self,
        writer: str,
        generation: int,
        stored: Iterable[Record] = (),
        *,
        records_max: int = RECORDS_MAX,
        ids_max: int = IDS_MAX,
        ids_merged_max: int = IDS_MERGED_MAX,
    ) -> None:
        self._writer = writer
        self._generation = generation
        self._records_max = records_max
        self._ids_max = ids_max
        self._ids_merged_max = ids_merged_max
        self._clock = 0
        self._records: dict[str, Record] = {}
        self._buckets: list[set[str]] = [set() for _ in range(BUCKETS)]
        self._digests = [0] * BUCKETS
        self._tombstones = 0
        self._refused = 0
        self._position = 0
        self.merge(stored)

    # Reading.

    @property
    def records(self) -> Mapping[str, Record]:
        """By id, deleted ones included. A live view."""
        return MappingProxyType(self._records)

    def value(self, record_id: str) -> bytes | None:
        """None where the id is deleted or not known."""
        record = self._records.get(record_id)
        return None if record is None else record.value

    @property
    def position(self) -> int:
        """Rises with each change, in this life only."""
        return self._position

    def digest(self) -> bytes:
        """Equal for two replicas exactly if they hold the same (but for a collision of 128-bit hashes)."""
        return hashlib.blake2b(b"".join(self.bucket_digests()), digest_size=DIGEST_BYTES).digest()

    def bucket_digests(self) -> list[bytes]:
        return [digest.to_bytes(DIGEST_BYTES, "big") for digest in self._digests]

    def in_bucket(self, bucket: int, after: str = "") -> Iterator[Record]:
        """In order of ids, those greater than `after`."""
        return (self._records[record_id] for record_id in sorted(self._buckets[bucket]) if record_id > after)

    def statistics(self) -> ReplicaStatistics:
        return ReplicaStatistics(len(self._records) - self._tombstones, self._tombstones, self._refused)

    # Editing.

    def draft(self, record_id: str, value: bytes) -> Record:
        """A record that outdoes all known of that id, not in the replica yet.

        Raises EditRefused where the id was deleted, or a new one exceeds the bounds; ValueError for a size."""
        if not 0 < len(record_id.encode()) <= RECORD_ID_BYTES_MAX:
            raise ValueError(f"an id of {len(record_id.encode())} bytes is not between 1 and {RECORD_ID_BYTES_MAX}")
        if len(value) > VALUE_BYTES_MAX:
            raise ValueError(f"a value of {len(value)} bytes exceeds {VALUE_BYTES_MAX}")
        known = self._records.get(record_id)
        if known is not None and known.is_deleted:
            raise EditRefused(f"{record_id!r} was deleted, which is for ever; create a new one under a new id")
        if known is None and len(self._records) - self._tombstones >= self._records_max:
            raise EditRefused(f"a mesh keeps at most {self._records_max} records, which there are; delete some first")
        if known is None and len(self._records) >= self._ids_max:
            raise EditRefused(
                f"a mesh remembers at most {self._ids_max} ids, deleted ones too, and there are; keep ids for longer"
            )
        if self._clock >= COUNT_MAX:
            raise EditRefused(f"the clock of the records is at its limit of {COUNT_MAX}; no mesh gets there by itself")
        self._clock += 1
        return Record(record_id, self._clock, self._writer, self._generation, value)

    def draft_deletion(self, record_id: str) -> Record:
        """A tombstone, not in the replica yet. Raises EditRefused for an id that is not known."""
        if record_id not in self._records:
            raise EditRefused(f"{record_id!r} is not known on this node; check the id, or ask again in some seconds")
        return Record(record_id)

    def merge(self, records: Iterable[Record]) -> list[Record]:
        """Those that changed the replica: to be put on disk, and told to the other peers."""
        return [record for record in records if self._merge(record)]

    def _merge(self, record: Record) -> bool:
        known = self._records.get(record.record_id)
        if known is not None and known.rank >= record.rank:
            return False
        if known is None and len(self._records) >= self._ids_merged_max:
            self._refused += 1
            return False
        bucket = bucket_of(record.record_id)
        self._digests[bucket] ^= int.from_bytes(hash_record(record), "big")
        if known is None:
            self._buckets[bucket].add(record.record_id)
        else:
            self._digests[bucket] ^= int.from_bytes(hash_record(known), "big")
        self._records[record.record_id] = record
        self._clock = max(self._clock, record.clock)
        self._tombstones += record.is_deleted
        self._position += 1
        return True
