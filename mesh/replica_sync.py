"""Two replicas become equal by requests and answers of bytes, exchanging no more than what differs.

The asker sends its digest; an equal answerer says so, and that is all. Else it answers the digests of its buckets, the
asker has the differing ones listed (id and version, in pages), then fetches what is greater there and gives what is
greater here. Only the asker has a state; the answerer may change meanwhile, and be another one after a fault: merging
is right in any order, and the next comparison finds what this one missed. Fresh edits are pushed at once, as `give`.

A message is one msgpack array [type, ...]. Arrays may be longer than this version knows: what follows is ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import msgpack

from mesh.errors import MalformedDatagram
from mesh.packed_arrays import field, items, unpack, unpack_array
from mesh.replica import (
    BUCKETS,
    DIGEST_BYTES,
    IDS_MERGED_MAX,
    RECORD_ID_BYTES_MAX,
    Record,
    Replica,
    encode_record,
    hash_record,
    read_record,
)
from mesh.wire import NODE_ID_BYTES_MAX, count, text

MESSAGE_BYTES_MAX = 256 * 1024
# Of one message: the longest records stay below MESSAGE_BYTES_MAX.
RECORDS_PER_MESSAGE = 128
# Of a listing: more would keep the loop of both nodes for over 10 ms.
LISTING_BYTES_MAX = 64 * 1024
_HASH_BYTES = 8  # of a record in a listing; they decide only between records of equal version

_COMPARE, _LIST, _FETCH, _GIVE, _DONE, _BUCKETS, _LISTING, _RECORDS = range(1, 9)


@dataclass(frozen=True, slots=True)
class Answer:
    """changed: records that the request brought; to be put on disk and told to others."""

    message: bytes
    changed: list[Record]


def give(records: Sequence[Record]) -> bytes:
    """Records the receiver may lack, at most RECORDS_PER_MESSAGE: the request that pushes fresh edits."""
    assert len(records) <= RECORDS_PER_MESSAGE
    return _pack(_GIVE, [encode_record(record) for record in records])


def answer(replica: Replica, request: bytes) -> Answer:
    """What to answer a request of give() or of an Asker. Raises MalformedDatagram; nothing has changed then."""
    fields = _array(unpack_array(request, MESSAGE_BYTES_MAX))
    kind = count(fields[0])
    if kind == _COMPARE:
        if _binary(field(fields, 1), DIGEST_BYTES) == replica.digest():
            return Answer(_pack(_DONE), [])
        return Answer(_pack(_BUCKETS, replica.bucket_digests()), [])
    if kind == _LIST:
        buckets = [count(bucket, BUCKETS - 1) for bucket in items(fields, 1, BUCKETS)]
        return Answer(_pack(_LISTING, _listing(replica, buckets, _text_or_empty(field(fields, 2)))), [])
    if kind == _FETCH:
        ids = [text(record_id, RECORD_ID_BYTES_MAX) for record_id in items(fields, 1, RECORDS_PER_MESSAGE)]
        found = [replica.records[record_id] for record_id in ids if record_id in replica.records]
        return Answer(_pack(_RECORDS, [encode_record(record) for record in found]), [])
    if kind == _GIVE:
        return Answer(_pack(_DONE), replica.merge(_records(fields)))
    raise MalformedDatagram(f"{kind} is no request of one replica to another")


@dataclass(frozen=True, slots=True)
class Step:
    """request: the next one, or None at the end. changed: as in Answer."""

    request: bytes | None
    changed: list[Record]


class Asker:
    """One comparison with one peer: `first()`, then `receive` each answer until a Step has no request."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._expected: tuple[int, ...] = (_DONE, _BUCKETS)
        self._buckets: list[int] = []  # to be listed yet
        self._after = ""  # in the first of them
        self._listed = 0
        self._wanted: list[str] = []
        self._offered: list[str] = []

    def first(self) -> bytes:
        return _pack(_COMPARE, self._replica.digest())

    def receive(self, message: bytes) -> Step:
        """Raises MalformedDatagram: the comparison is over, and this message has changed nothing."""
        fields = _array(unpack_array(message, MESSAGE_BYTES_MAX))
        kind = count(fields[0])
        if kind not in self._expected:
            raise MalformedDatagram(f"{kind} answers nothing that was asked")
        changed: list[Record] = []
        if kind == _BUCKETS:
            digests = [_binary(digest, DIGEST_BYTES) for digest in items(fields, 1, BUCKETS)]
            if len(digests) != BUCKETS:
                raise MalformedDatagram(f"{len(digests)} digests of {BUCKETS} buckets")
            ours = self._replica.bucket_digests()
            self._buckets = [bucket for bucket in range(BUCKETS) if digests[bucket] != ours[bucket]]
        elif kind == _LISTING:
            changed = self._replica.merge(self._compare(_chunks(fields)))
        elif kind == _RECORDS:
            changed = self._replica.merge(_records(fields))
        return Step(self._next(), changed)

    def _next(self) -> bytes | None:
        if self._buckets:
            self._expected = (_LISTING,)
            return _pack(_LIST, self._buckets, self._after)
        if self._wanted:
            ids = self._wanted[:RECORDS_PER_MESSAGE]
            del self._wanted[:RECORDS_PER_MESSAGE]
            self._expected = (_RECORDS,)
            return _pack(_FETCH, ids)
        if self._offered:
            records = [self._replica.records[record_id] for record_id in self._offered[:RECORDS_PER_MESSAGE]]
            del self._offered[:RECORDS_PER_MESSAGE]
            self._expected = (_DONE,)
            return give(records)
        self._expected = ()
        return None

    def _compare(self, chunks: list[_Chunk]) -> list[Record]:
        """Note what differs, and how far the listing went. Returns the tombstones listed: they need no fetching."""
        self._check(chunks)
        tombstones = []
        for chunk in chunks:
            last = chunk.entries[-1].record_id if chunk.entries else ""
            named = set()
            for entry in chunk.entries:
                named.add(entry.record_id)
                ours = self._replica.records.get(entry.record_id)
                if entry.is_deleted:
                    if ours is None or not ours.is_deleted:
                        tombstones.append(Record(entry.record_id))
                elif ours is None or (ours.rank[:4] <= entry.rank and not entry.is_of(ours)):
                    self._wanted.append(entry.record_id)
                if ours is not None and ours.rank[:4] >= entry.rank and not entry.is_of(ours):
                    self._offered.append(entry.record_id)  # where versions are equal, wanted as well
            for record in self._replica.in_bucket(chunk.bucket, self._after):
                if record.record_id not in named and (chunk.is_whole or record.record_id <= last):
                    self._offered.append(record.record_id)
            self._after = "" if chunk.is_whole else last
        self._listed += sum(len(chunk.entries) for chunk in chunks)
        del self._buckets[: sum(chunk.is_whole for chunk in chunks)]
        return tombstones

    def _check(self, chunks: list[_Chunk]) -> None:
        """Every listing goes on where the last one ended, so that they end."""
        after = self._after
        if not chunks or [chunk.bucket for chunk in chunks] != self._buckets[: len(chunks)]:
            raise MalformedDatagram("a listing of other buckets than those asked for")
        for chunk in chunks:
            ids = [after, *(entry.record_id for entry in chunk.entries)]
            if any(a >= b for a, b in pairwise(ids)):
                raise MalformedDatagram("a listing whose ids do not rise")
            after = ""
        if any(not chunk.is_whole for chunk in chunks[:-1]) or not (chunks[-1].is_whole or chunks[-1].entries):
            raise MalformedDatagram("a listing that ends nowhere")
        if self._listed + sum(len(chunk.entries) for chunk in chunks) > IDS_MERGED_MAX:
            raise MalformedDatagram(f"a listing of more than {IDS_MERGED_MAX} ids")


@dataclass(frozen=True, slots=True)
class _Entry:
    """One record in a listing. rank: as of Record, without the value; hash: a part of the record's."""

    record_id: str
    rank: tuple[bool, int, str, int]
    hash: bytes

    @property
    def is_deleted(self) -> bool:
        return self.rank[0]

    def is_of(self, record: Record) -> bool:
        if self.is_deleted or record.is_deleted:
            return self.is_deleted and record.is_deleted
        return self.rank == record.rank[:4] and self.hash == hash_record(record)[:_HASH_BYTES]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """What one bucket holds after some id: all, or, in the last chunk of a listing, as much as fitted."""

    bucket: int
    is_whole: bool
    entries: list[_Entry]


def _listing(replica: Replica, buckets: Iterable[int], after: str) -> list[list[object]]:
    chunks: list[list[object]] = []
    room_bytes = LISTING_BYTES_MAX
    for bucket in buckets:
        entries: list[bytes] = []
        is_whole = True
        for record in replica.in_bucket(bucket, after):
            if room_bytes <= 0:
                is_whole = False
                break
            entries.append(_encode_entry(record))
            room_bytes -= len(entries[-1]) + 3
        if entries or is_whole:
            chunks.append([bucket, is_whole, entries])
        if not is_whole:
            break
        after = ""
    return chunks


def _encode_entry(record: Record) -> bytes:
    fields: list[object] = [record.record_id]
    if not record.is_deleted:
        fields += [record.clock, record.writer, record.generation, hash_record(record)[:_HASH_BYTES]]
    encoded: bytes = msgpack.packb(fields)
    return encoded


def _read_entry(encoded: Any) -> _Entry:
    fields = _array(unpack(encoded))
    record_id = text(fields[0], RECORD_ID_BYTES_MAX)
    if len(fields) == 1:
        return _Entry(record_id, (True, 0, "", 0), b"")
    if len(fields) < 5:
        raise MalformedDatagram(f"an entry has 1 field or at least 5, not {len(fields)}")
    writer = text(fields[2], NODE_ID_BYTES_MAX)
    return _Entry(record_id, (False, count(fields[1]), writer, count(fields[3])), _binary(fields[4], _HASH_BYTES))


def _chunks(fields: list[Any]) -> list[_Chunk]:
    chunks = []
    for item in items(fields, 1, BUCKETS):
        chunk = _array(item)
        if type(field(chunk, 1)) is not bool:
            raise MalformedDatagram("a chunk that does not say if it is whole")
        entries = [_read_entry(entry) for entry in items(chunk, 2, MESSAGE_BYTES_MAX)]
        chunks.append(_Chunk(count(chunk[0], BUCKETS - 1), chunk[1], entries))
    return chunks


def _records(fields: list[Any]) -> list[Record]:
    return [read_record(unpack(item)) for item in items(fields, 1, RECORDS_PER_MESSAGE)]


def _pack(*fields: object) -> bytes:
    message: bytes = msgpack.packb(fields)
    assert len(message) <= MESSAGE_BYTES_MAX
    return message


def _array(value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise MalformedDatagram(f"expected an array, got a {type(value).__name__}")
    return value


def _binary(value: Any, length: int) -> bytes:
    if not isinstance(value, bytes) or len(value) != length:
        raise MalformedDatagram(f"expected {length} bytes, got a {type(value).__name__}")
    return value


def _text_or_empty(value: Any) -> str:
    return "" if value == "" else text(value, RECORD_ID_BYTES_MAX)
