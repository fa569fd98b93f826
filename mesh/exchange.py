"""Comparing everything two nodes know, over their peer link: when one joins, now and then, and where a bulk section is
missing that fits no datagram.

One question, one answer: the asker names what it holds of every member, tombstones included, and gets the records that
are newer. What the answerer lacks it asks for in its own turn.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import dataclass

import msgpack

from mesh.anti_entropy import is_behind, lacking_of
from mesh.errors import MalformedDatagram
from mesh.gossip_types import GossipConfig
from mesh.member import Member, id_hash
from mesh.membership import MEMBERS_MAX, MemberTable
from mesh.packets import DigestEntry, Record
from mesh.view import MemberStatus
from mesh.wire import (
    BULK_BYTES_MAX,
    NODE_ID_BYTES_MAX,
    count,
    pack_digest_entry,
    text,
    unpack_digest_entry,
    unpack_record,
)

ANSWER_BYTES_MAX = 3 * 1024 * 1024  # below what one event of a peer link carries; what is left out is asked for again
QUESTION_BYTES_MAX = 2 * 1024 * 1024  # entries of MEMBERS_MAX members under the longest names
UNDER_WAY_MAX = 2  # questions of one node at one time
UNDER_WAY_S = 10.0  # after this a question counts as lost
LACKING_MAX = 64  # members whose bulk section is missed at one time; the others are found by the periodic exchange


class ExchangeTurns:
    """When to ask, and whom."""

    def __init__(self, config: GossipConfig, table: MemberTable, rng: random.Random, now: float) -> None:
        self._config = config
        self._table = table
        self._rng = rng
        self._at = now + rng.uniform(0.5, 1.0) * config.exchange_interval_s
        self._spaced_until = now
        self._wanted: OrderedDict[str, float] = OrderedDict()  # whom to ask, and when
        self._asked: OrderedDict[str, float] = OrderedDict()  # who was asked, and until when the answer is waited for

    def want(self, node_id: str, at: float) -> None:
        """Ask this member then, unless that is intended already."""
        if node_id not in self._wanted and len(self._wanted) < LACKING_MAX:
            self._wanted[node_id] = at

    def next_wakeup(self) -> float:
        return max(self._spaced_until, min(self._at, *self._wanted.values(), float("inf")))

    def due(self, now: float) -> Member | None:
        """Whom to ask now, if anybody."""
        if now < self.next_wakeup():
            return None
        while self._asked and next(iter(self._asked.values())) <= now:
            self._asked.popitem(last=False)
        if len(self._asked) >= UNDER_WAY_MAX:
            self._spaced_until = now + self._config.exchange_spacing_s
            return None
        peer = self._next_peer(now)
        if peer is not None:
            self._asked[peer.node_id] = now + UNDER_WAY_S
            self._spaced_until = now + self._config.exchange_spacing_s
        return peer

    def ended(self, node_id: str) -> None:
        """The answer came, or none will."""
        self._asked.pop(node_id, None)

    def _next_peer(self, now: float) -> Member | None:
        for node_id in [i for i, at in self._wanted.items() if at <= now]:
            del self._wanted[node_id]
            member = self._table.members.get(node_id)
            if member is not None and member.is_live and node_id not in self._asked:
                return member
        if now < self._at:
            return None
        self._at = now + self._rng.uniform(0.5, 1.0) * self._config.exchange_interval_s
        return self._rng.choice(self._table.live) if self._table.live else None


def encode_question(table: MemberTable) -> bytes:
    """What this node holds of every member, itself included, under their names: of two with one hash both count."""
    entries = [[m.node_id, *pack_digest_entry(m.asking_entry())[1:]] for m in table.members.values()]
    encoded: bytes = msgpack.packb([table.own.node_id, entries])
    return encoded


def answer(table: MemberTable, question: bytes, now: float) -> bytes:
    """The records that the asker lacks; behind that of one who is gone, for how many seconds. Raises
    MalformedDatagram."""
    asker, held = _read_question(question)
    records: list[bytes] = []
    room_bytes = ANSWER_BYTES_MAX
    for member in table.members.values():
        theirs = held.get(member.node_id, DigestEntry(member.id_hash, 0, 0, MemberStatus.ALIVE, 0))
        ours = member.digest_entry()
        is_missing = member.node_id not in held or theirs.bulk_version < ours.bulk_version
        if member.node_id == asker or not (is_missing or is_behind(theirs, ours, 1)):
            continue
        record = lacking_of(theirs, member).encoded(is_datagram=False)
        if (gone_since := table.tombstones.get(member.node_id)) is not None:
            record += msgpack.packb(max(0, int(now - gone_since)))
        room_bytes -= len(record)
        if room_bytes < 0:
            break
        records.append(record)
    return b"".join(records)


@dataclass(frozen=True, slots=True)
class Told:
    """One record of an answer. gone_s: for how long the member has been known to be gone, None for a live one."""

    record: Record
    gone_s: int | None = None


def decode_answer(data: bytes) -> list[Told]:
    """Raises MalformedDatagram."""
    if len(data) > ANSWER_BYTES_MAX:
        raise MalformedDatagram(f"an answer of {len(data)} bytes exceeds {ANSWER_BYTES_MAX}")
    unpacker = msgpack.Unpacker(strict_map_key=True, max_buffer_size=ANSWER_BYTES_MAX)
    unpacker.feed(data)
    told: list[Told] = []
    try:
        while unpacker.tell() < len(data):
            item = unpacker.unpack()
            if told and type(item) is int:
                told[-1] = Told(told[-1].record, count(item))
            else:
                told.append(Told(unpack_record(item, BULK_BYTES_MAX)))
    except (msgpack.UnpackException, ValueError) as exc:
        raise MalformedDatagram(f"an answer of {len(data)} bytes is no msgpack: {exc!r}") from exc
    return told


def _read_question(question: bytes) -> tuple[str, dict[str, DigestEntry]]:
    """Who asks, and what it holds, by node id."""
    if len(question) > QUESTION_BYTES_MAX:
        raise MalformedDatagram(f"a question of {len(question)} bytes exceeds {QUESTION_BYTES_MAX}")
    try:
        fields = msgpack.unpackb(question)
    except (msgpack.UnpackException, ValueError) as exc:
        raise MalformedDatagram(f"a question of {len(question)} bytes is no msgpack: {exc!r}") from exc
    if not isinstance(fields, list) or len(fields) < 2 or not isinstance(fields[1], list):
        raise MalformedDatagram("a question is a name and an array of entries")
    if len(fields[1]) > MEMBERS_MAX:
        raise MalformedDatagram(f"a question of {len(fields[1])} entries exceeds {MEMBERS_MAX}")
    held: dict[str, DigestEntry] = {}
    for entry in fields[1]:
        if not isinstance(entry, list) or not entry:
            raise MalformedDatagram("an entry is an array that begins with a node id")
        node_id = text(entry[0], NODE_ID_BYTES_MAX)
        held[node_id] = unpack_digest_entry([id_hash(node_id), *entry[1:]])
    return text(fields[0], NODE_ID_BYTES_MAX), held
