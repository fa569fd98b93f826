"""Comparing what two nodes hold, so that whatever rumours lost arrives in the end. Digests go over ranges of id hashes:
within a range the absence of an entry says something too, however many members there are."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from mesh.gossip_types import GossipConfig
from mesh.member import Member
from mesh.membership import MemberTable
from mesh.packets import Digest, DigestEntry
from mesh.view import MemberStatus
from mesh.wire import BULK_INLINE_BYTES_MAX, DIGEST_ENTRIES_MAX, HASH_MAX, NODE_ID_BYTES_MAX, digest_entry_bytes

# The entries of one digest; the rest of its packet is for the head and the sender's own record.
ENTRIES_BYTES_MAX = 1_000 - NODE_ID_BYTES_MAX
# Members whose profile or load is asked for at one time; comparisons with each of them bring those of others too.
LACKING_MAX = 64


class DigestTurns:
    """When to compare, with whom, and from which id hash on."""

    def __init__(self, config: GossipConfig, table: MemberTable, rng: random.Random, now: float) -> None:
        self.next_at = now + rng.random() * config.digest_interval_s
        self._config = config
        self._table = table
        self._rng = rng
        self._low = 0
        self._lacking: OrderedDict[str, None] = OrderedDict()
        self._asks_itself = False

    def hurry(self, member: Member, now: float) -> None:
        """A profile or load of this member is missing: compare soon, until it is there, beginning at this member."""
        if len(self._lacking) < LACKING_MAX or member.node_id in self._lacking:
            self._lacking[member.node_id] = None
            self.next_at = min(self.next_at, now + self._config.digest_hurry_s)

    def due(self, now: float) -> Member | None:
        """Who to compare with now, if anybody."""
        if now < self.next_at:
            return None
        anybody = self._rng.choice(self._table.live) if self._table.live else None
        lacking = self._next_lacking()
        if lacking is None:
            self.next_at = now + self._config.digest_interval_s
            return anybody
        self._low = lacking.id_hash
        self.next_at = now + self._config.digest_hurry_s
        # Itself, who has it, and others by turns, who may, since it may not be heard from here.
        self._asks_itself = not self._asks_itself
        return lacking if self._asks_itself else anybody

    def _next_lacking(self) -> Member | None:
        while self._lacking:
            node_id, _ = self._lacking.popitem(last=False)
            member = self._table.members.get(node_id)
            if member is None or not member.is_live:
                continue
            if member.lacks_load or member.warm_version > member.profile_version:
                self._lacking[node_id] = None  # asked again after the others, unless it answers
                return member
        return None

    def build(self) -> Digest:
        """The next digest, of as many members as fit; over the turns all have theirs."""
        digest, self._low = build_digest(self._table, self._low)
        return digest


@dataclass(frozen=True, slots=True)
class Lacking:
    """A member that the other side should be told of, and with which of its sections beside the load."""

    member: Member
    with_warm: bool = True
    with_bulk: bool = True

    def encoded(self, *, is_datagram: bool = True) -> bytes:
        """Its record. is_datagram: without a bulk section that fits none."""
        fits = not is_datagram or len(self.member.bulk) <= BULK_INLINE_BYTES_MAX
        return self.member.encoded(with_warm=self.with_warm, with_bulk=self.with_bulk and fits)


@dataclass(frozen=True, slots=True)
class Difference:
    """What a comparison found. lacking: what the other side should be told."""

    lacking: list[Lacking]
    wanted: tuple[DigestEntry, ...]


def build_digest(table: MemberTable, low: int) -> tuple[Digest, int]:
    """(digest of as many members from that hash on as fit, where the next one begins)."""
    entries: list[DigestEntry] = []
    room_bytes = ENTRIES_BYTES_MAX
    for member in table.between(low, HASH_MAX):
        entry = member.asking_entry()
        room_bytes -= digest_entry_bytes(entry)
        if room_bytes < 0 or len(entries) == DIGEST_ENTRIES_MAX:
            return Digest(low, max(low, member.id_hash - 1), tuple(entries)), member.id_hash
        entries.append(entry)
    return Digest(low, HASH_MAX, tuple(entries)), 0


def compare(table: MemberTable, digest: Digest, sender_id: str, lag_versions: int) -> Difference:
    """What the sender of a digest lacks, and what this node does, as entries of what it holds itself."""
    lacking: list[Lacking] = []
    wanted: list[DigestEntry] = []
    named = set()
    room_bytes = ENTRIES_BYTES_MAX
    for theirs in digest.entries:
        named.add(theirs.id_hash)
        node_id = table.id_of_hash.get(theirs.id_hash)
        member = table.members[node_id] if node_id is not None else None
        if member is not None and is_behind(theirs, member.digest_entry(), lag_versions):
            lacking.append(lacking_of(theirs, member))
        asking = member.asking_entry() if member else DigestEntry(theirs.id_hash, 0, 0, MemberStatus.ALIVE, 0)
        if is_behind(asking, theirs, lag_versions) and (room_bytes := room_bytes - digest_entry_bytes(asking)) >= 0:
            wanted.append(asking)
    lacking += _unnamed(table.between(digest.low, digest.high), named, sender_id)
    return Difference(lacking, tuple(wanted))


def is_behind(a: DigestEntry, b: DigestEntry, lag_versions: int) -> bool:
    """True where the holder of `a` should be told what the holder of `b` knows. A load a little older is no reason:
    the next publication is on its way."""
    if a.generation != b.generation:
        return a.generation < b.generation
    if a.profile_version < b.profile_version or a.version + lag_versions <= b.version:
        return True
    if a.bulk_version < b.bulk_version and b.bulk_version + lag_versions <= b.version:
        return True  # published a while ago, so it is not on its way any more
    return a.status is not b.status and (a.version, a.status) < (b.version, b.status)


def lacking_of(theirs: DigestEntry, member: Member) -> Lacking:
    """What to tell of a member to one who holds `theirs` of it."""
    is_later_life = theirs.generation < member.generation
    return Lacking(
        member,
        with_warm=is_later_life or theirs.profile_version < member.profile_version,
        with_bulk=is_later_life or theirs.bulk_version < member.bulk_version,
    )


def _unnamed(members: Iterable[Member], named: set[int], sender_id: str) -> list[Lacking]:
    return [Lacking(m) for m in members if m.id_hash not in named and m.node_id != sender_id]
