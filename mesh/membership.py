"""The member table. The only place that compares claims; sees no socket, no clock and no randomness but a given one.

The state version is the incarnation: a node owns (generation, version) and raises the version with all it publishes, so
whatever shows a newer version is a sign of life. Of two claims the greater (generation, version, status) holds, with
ALIVE < SUSPECT < DEAD < LEFT: a suspicion says "no life after version v", and any newer version refutes it, wherever it
comes from. Sections merge by their own versions within the generation. So merging is a join: commutative, associative,
idempotent.
"""

from __future__ import annotations

import random
import zlib
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mesh.signs import Sign, encode_sign, long_hash
from mesh.state import decode_load, decode_profile
from mesh.view import Address, MemberStatus, MemberView, NodeLoad, NodeProfile
from mesh.wire import (
    ACCUSERS_MAX,
    BULK_INLINE_BYTES_MAX,
    HASH_MAX,
    SECTION_BYTES_MAX,
    DigestEntry,
    Record,
    encode_record,
)

MEMBERS_MAX = 16_384  # in the table, tombstones included; about 2 KiB each
TOMBSTONES_MAX = 4_096  # beyond it the oldest is forgotten before its time

LIVE = (MemberStatus.ALIVE, MemberStatus.SUSPECT)


class Change:
    """What one record would do to the table, as bits. Plain integers: an IntFlag costs a third of a merge."""

    NEW = 1  # a member not known before
    ADVANCED = 2  # a newer (generation, version)
    GENERATION = 4
    STATUS = 8
    ACCUSED = 16  # more accusers of the same suspicion
    LOAD = 32
    READINESS = 64  # within LOAD: what it says of itself flipped
    PROFILE = 128
    BULK = 256


# What a reader of the view may want to be told of, and what must spread at once.
NEWS = Change.NEW | Change.GENERATION | Change.STATUS | Change.READINESS | Change.PROFILE


class Member:
    """One row. Only the table changes it; `load` alone may be replaced by a fresher one that came another way."""

    __slots__ = (
        "_encoded",
        "_encoded_sign",
        "accusers",
        "address",
        "advanced_at",
        "boot_id",
        "bulk",
        "bulk_version",
        "bulk_version_heard",
        "generation",
        "hot",
        "hot_load",
        "hot_since",
        "id_hash",
        "known_since",
        "load",
        "load_at",
        "load_version",
        "long_hash",
        "node_id",
        "profile",
        "profile_version",
        "status",
        "suspected_at",
        "told_by",
        "version",
        "warm",
        "warm_version",
    )

    def __init__(self, record: Record, now: float) -> None:
        self.node_id = record.node_id
        self.id_hash = id_hash(record.node_id)
        self.long_hash = long_hash(record.node_id)
        self.address = record.address
        self.generation = record.generation
        self.version = record.version
        self.status = record.status
        self.accusers = record.accusers
        self.warm_version = record.warm_version  # the newest heard of
        self.profile_version = 0  # the one held
        self.load_version = 0
        self.load = NodeLoad()
        self.profile = NodeProfile()
        self.hot: bytes | None = None
        self.hot_load = NodeLoad()  # what `hot` says; `load` may be fresher
        self.hot_since = 0  # nothing but the version has changed from this one to `version`; 0: it is not known
        self.warm: bytes | None = None
        self.bulk = b""
        self.bulk_version = 0  # the one held
        self.bulk_version_heard = record.bulk_version  # the newest heard of
        self.known_since = now  # this life of it
        self.advanced_at = now
        self.load_at = now
        self.suspected_at = now  # meaningful while SUSPECT
        self.told_by = ""  # the peer that last told news of it, who need not be told
        self.boot_id = record.boot_id  # of the process that speaks for it, once heard of
        self._encoded: dict[tuple[bool, bool], bytes] = {}
        self._encoded_sign = b""

    @property
    def is_live(self) -> bool:
        return self.status in LIVE

    @property
    def lacks_load(self) -> bool:
        """A sign of life told of a load that has not come: whoever holds it is to be asked."""
        return self.hot_since > self.load_version

    @property
    def is_bulk_news(self) -> bool:
        """The bulk section was published at the version claimed, and fits a datagram: it goes along with the load."""
        return 0 < self.bulk_version == self.version and len(self.bulk) <= BULK_INLINE_BYTES_MAX

    def record(self, *, with_warm: bool, with_bulk: bool) -> Record:
        """What this node tells others of it. The hot section rides only while it is of the claimed version, and only
        where the others leave room for it in a datagram; so does bulk beside warm, unless it fits none anyway."""
        hot = self.hot if self.load_version == self.version else None
        warm = self.warm if with_warm and self.profile_version == self.warm_version else None
        bulk = self.bulk if with_bulk and self.bulk_version == self.bulk_version_heard else None
        if bulk is not None and warm is not None and BULK_INLINE_BYTES_MAX >= len(bulk) > SECTION_BYTES_MAX - len(warm):
            bulk = None
        if hot is not None and len(hot) + len(warm or b"") + len(bulk or b"") > SECTION_BYTES_MAX:
            hot = None
        return Record(
            node_id=self.node_id,
            generation=self.generation,
            version=self.version,
            status=self.status,
            address=self.address,
            warm_version=self.warm_version,
            hot=hot,
            warm=warm,
            accusers=self.accusers,
            bulk_version=self.bulk_version_heard,
            bulk=bulk,
            boot_id=self.boot_id if with_warm else b"",
        )

    def accusation(self, status: MemberStatus, accusers: tuple[int, ...]) -> Record:
        """The claim that it is SUSPECT or DEAD at the version known."""
        return Record(
            self.node_id,
            self.generation,
            self.version,
            status,
            self.address,
            self.warm_version,
            accusers=accusers,
            bulk_version=self.bulk_version_heard,
        )

    def encoded(self, *, with_warm: bool, with_bulk: bool | None = None) -> bytes:
        """record() as bytes, encoded once per change. with_bulk: left out, where it is news."""
        kind = (with_warm, self.is_bulk_news if with_bulk is None else with_bulk)
        if kind[1] and len(self.bulk) > BULK_INLINE_BYTES_MAX:
            return encode_record(self.record(with_warm=kind[0], with_bulk=True))  # too much to keep a second time
        encoded = self._encoded.get(kind)
        if encoded is None:
            encoded = self._encoded[kind] = encode_record(self.record(with_warm=kind[0], with_bulk=kind[1]))
        return encoded

    def encoded_sign(self) -> bytes:
        """Its newest version as a sign of life, encoded once per change. Empty where that needs a record: it is not
        ALIVE, has changed its load in this version, or whether it has is not known."""
        if self.status is not MemberStatus.ALIVE or not 0 < self.hot_since < self.version:
            return b""
        if not self._encoded_sign:
            unchanged = self.version - self.hot_since
            self._encoded_sign = encode_sign(Sign(self.long_hash, self.generation, self.version, unchanged))
        return self._encoded_sign

    def know_unchanged(self, sign: Sign) -> None:
        """What a sign of life that was merged says of the version known."""
        since = sign.version - sign.unchanged
        is_current = (sign.generation, sign.version) == (self.generation, self.version)
        if is_current and since > 0 and not 0 < self.hot_since <= since:
            self.hot_since = since
            self._encoded_sign = b""

    def touched(self) -> None:
        self._encoded.clear()
        self._encoded_sign = b""

    def digest_entry(self) -> DigestEntry:
        return DigestEntry(
            self.id_hash, self.generation, self.version, self.status, self.profile_version, self.bulk_version
        )

    def asking_entry(self) -> DigestEntry:
        """digest_entry() as it is sent to ask for what is newer: anything is, while a load is lacked."""
        entry = self.digest_entry()
        return replace(entry, version=0) if self.lacks_load and self.is_live else entry

    def view(self, now: float, *, is_self: bool) -> MemberView:
        return MemberView(
            node_id=self.node_id,
            address=self.address,
            status=self.status,
            generation=self.generation,
            version=self.version,
            load=self.load,
            profile=self.profile,
            age_s=0.0 if is_self else max(0.0, now - self.advanced_at),
            is_self=is_self,
            load_age_s=0.0 if is_self else max(0.0, now - self.load_at),
            load_version=self.load_version,
            bulk=self.bulk,
            bulk_version=self.bulk_version,
        )


def sign_record(member: Member, sign: Sign) -> Record:
    """The record for which a sign stands to one who holds this row: with the load, where that held is of a version
    since which it did not change."""
    is_load_held = member.load_version >= sign.version - sign.unchanged > 0
    return Record(
        member.node_id,
        sign.generation,
        sign.version,
        MemberStatus.ALIVE,
        member.address,
        member.warm_version,
        member.hot if is_load_held else None,
        bulk_version=member.bulk_version_heard,
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """What a record changes, its sections decoded: all that can fail has been done."""

    record: Record
    change: int
    load: NodeLoad | None
    profile: NodeProfile | None


class MemberTable:
    """All members by id, this node's own row included.

    live: the others that are ALIVE or SUSPECT, in no order, for choosing by index."""

    def __init__(self, own: Member) -> None:
        self.own = own
        self.members: dict[str, Member] = {own.node_id: own}
        self.live: list[Member] = []
        self.tombstones: OrderedDict[str, float] = OrderedDict()  # DEAD and LEFT: since when, as they were learnt
        self.dead: dict[str, None] = {}  # of the tombstones those that are called again: DEAD and not LEFT
        self.id_of_hash: dict[int, str] = {own.id_hash: own.node_id}  # of two equal hashes the later one
        self._by_long_hash: dict[int, Member] = {}  # but for this node itself
        self.refused = 0  # new members that found the table full
        self._live_index: dict[str, int] = {}
        self._stalest: OrderedDict[str, None] = OrderedDict()  # live ids by last advance, oldest first
        self._hashes: list[tuple[int, str]] = [(own.id_hash, own.node_id)]  # own and live, sorted, for digests

    def plan(self, record: Record) -> Plan | None:
        """What merging would change, or None. Raises MalformedDatagram for a section it would take."""
        member = self.members.get(record.node_id)
        change = 0
        if member is None:
            change = Change.NEW | Change.ADVANCED
            # Version 0 is held of whoever has published nothing, so nothing is published under it.
            takes_hot = record.hot is not None and record.version > 0
            takes_warm = record.warm is not None and record.warm_version > 0
            takes_bulk = record.bulk is not None and record.bulk_version > 0
        else:
            if record.generation < member.generation:
                return None
            is_later_life = record.generation > member.generation
            if is_later_life:
                change |= Change.GENERATION | Change.ADVANCED
            elif record.version > member.version:
                change |= Change.ADVANCED
            if change or (record.version == member.version and record.status > member.status):
                if record.status is not member.status:
                    change |= Change.STATUS
            elif (
                record.version == member.version
                and record.status is member.status is MemberStatus.SUSPECT
                and join_accusers(member.accusers, record.accusers) != member.accusers
            ):
                change |= Change.ACCUSED
            load_version, profile_version = (0, 0) if is_later_life else (member.load_version, member.profile_version)
            takes_hot = record.hot is not None and record.version > load_version
            takes_warm = record.warm is not None and record.warm_version > profile_version
            bulk_version = 0 if is_later_life else member.bulk_version
            takes_bulk = record.bulk is not None and record.bulk_version > bulk_version
        load: NodeLoad | None = None
        if takes_hot and record.hot is not None:
            is_held = member is not None and record.hot == member.hot
            load = member.hot_load if member is not None and is_held else decode_load(record.hot)
        profile = decode_profile(record.warm) if takes_warm and record.warm is not None else None
        if load is not None:
            change |= Change.LOAD
            if member is None or load.readiness is not member.load.readiness:
                change |= Change.READINESS
        if profile is not None:
            change |= Change.PROFILE
        if takes_bulk:
            change |= Change.BULK
        return Plan(record, change, load, profile) if change else None

    def news_in(self, sign: Sign) -> Member | None:
        """The member that this sign of life says something new of, None as a rule: most signs come several times."""
        member = self._by_long_hash.get(sign.long_hash)
        if member is None or sign.version < member.version or sign.generation != member.generation:
            return None
        is_known = sign.version == member.load_version and 0 < member.hot_since <= sign.version - sign.unchanged
        return None if is_known else member

    def apply(self, plan: Plan, now: float, *, told_by: str) -> Member | None:
        """Make the change. Returns the row, or None where the table is full (counted in `refused`)."""
        record, change = plan.record, plan.change
        member = self.members.get(record.node_id)
        if member is None:
            if len(self.members) >= MEMBERS_MAX:
                self.refused += 1
                return None
            member = self.members[record.node_id] = Member(record, now)
            self.id_of_hash[member.id_hash] = member.node_id
            self._by_long_hash[member.long_hash] = member
            self._place(member, now)
        elif change & (Change.ADVANCED | Change.STATUS):
            self._claim(member, record, change, now)
        elif change & Change.ACCUSED:
            member.accusers = join_accusers(member.accusers, record.accusers)
        if plan.load is not None:
            if record.version == member.version and not member.hot_since:
                member.hot_since = record.version
            is_current = 0 < member.hot_since <= record.version  # a sign of life may have come before
            member.hot, member.hot_load = record.hot, plan.load
            member.load_version = member.version if is_current else record.version
            if member.load_version > member.load.after_version:  # else what the peer link brought is newer
                member.load, member.load_at = plan.load, now
        if plan.profile is not None:
            member.profile, member.warm = plan.profile, record.warm
            member.profile_version = record.warm_version
        if change & Change.BULK:
            member.bulk, member.bulk_version = record.bulk or b"", record.bulk_version
        member.bulk_version_heard = max(member.bulk_version_heard, record.bulk_version)
        member.warm_version = max(member.warm_version, record.warm_version)
        member.boot_id = member.boot_id or record.boot_id
        member.told_by = told_by
        member.touched()
        return member

    def _claim(self, member: Member, record: Record, change: int, now: float) -> None:
        if change & Change.GENERATION:
            # Another life of this node: what the former one published says nothing of it.
            member.load, member.profile = NodeLoad(), NodeProfile()
            member.hot = member.warm = None
            member.bulk = b""
            member.load_version = member.profile_version = member.warm_version = 0
            member.bulk_version = member.bulk_version_heard = 0
            member.load_at = member.known_since = now
            member.boot_id = record.boot_id
            member.address = record.address
        was_live = member.is_live
        member.generation, member.version = record.generation, record.version
        member.status, member.accusers = record.status, record.accusers
        if member.status is MemberStatus.SUSPECT:
            member.suspected_at = now
        if change & Change.ADVANCED:
            member.advanced_at = now
            member.hot_since = 0
            if member.node_id in self._stalest:
                self._stalest.move_to_end(member.node_id)
        if was_live != member.is_live:
            self._place(member, now)
        elif member.status is MemberStatus.LEFT:
            self.dead.pop(member.node_id, None)

    def _place(self, member: Member, now: float) -> None:
        """Put a row among the living or among the tombstones, where it was not before."""
        node_id = member.node_id
        if member.is_live:
            self.tombstones.pop(node_id, None)
            self.dead.pop(node_id, None)
            self._live_index[node_id] = len(self.live)
            self.live.append(member)
            self._stalest[node_id] = None
            insort(self._hashes, (member.id_hash, node_id))
            return
        self.tombstones[node_id] = now
        if member.status is MemberStatus.DEAD:
            self.dead[node_id] = None
        index = self._live_index.pop(node_id, None)
        if index is not None:
            last = self.live.pop()
            if last is not member:
                self.live[index] = last
                self._live_index[last.node_id] = index
            del self._stalest[node_id]
            del self._hashes[bisect_left(self._hashes, (member.id_hash, node_id))]
        if len(self.tombstones) > TOMBSTONES_MAX:
            self._forget_oldest()

    def forget(self, before: float) -> bool:
        """Drop tombstones made before that time. True if any was."""
        expired = [node_id for node_id, since in self.tombstones.items() if since < before]
        for node_id in expired:
            self._forget(node_id)
        return bool(expired)

    def bury(self, plan: Plan, since: float, now: float) -> bool:
        """Take in a member not known before that has been gone since then. False where the table is full."""
        if len(self.tombstones) >= TOMBSTONES_MAX:
            return False  # what this node saw itself is worth more
        member = self.apply(plan, now, told_by="")
        if member is None or member.is_live:
            return False
        self.tombstones[member.node_id] = since
        return True

    def _forget_oldest(self) -> None:
        self._forget(next(iter(self.tombstones)))

    def _forget(self, node_id: str) -> None:
        del self.tombstones[node_id]
        self.dead.pop(node_id, None)
        member = self.members.pop(node_id)
        if self.id_of_hash.get(member.id_hash) == node_id:
            del self.id_of_hash[member.id_hash]
        if self._by_long_hash.get(member.long_hash) is member:
            del self._by_long_hash[member.long_hash]

    def stalest(self) -> Member | None:
        """The live member whose last advance is the longest ago."""
        node_id = next(iter(self._stalest), None)
        return None if node_id is None else self.members[node_id]

    def postpone(self, delay_s: float) -> None:
        """This node stood still for so long and heard nobody: forgive everybody that time. Loads are as old
        as they are."""
        for member in self.live:
            member.suspected_at += delay_s
            member.advanced_at += delay_s

    def between(self, low: int, high: int) -> Iterator[Member]:
        """Own and live members with low <= id hash <= high, in that order."""
        for index in range(bisect_left(self._hashes, (low, "")), len(self._hashes)):
            hashed, node_id = self._hashes[index]
            if hashed > high:
                return
            yield self.members[node_id]

    def sample(
        self, rng: random.Random, count: int, without: str, *, heard_since: float = float("-inf")
    ) -> list[Member]:
        """Up to `count` different members that are ALIVE and whose last advance is not before `heard_since`."""
        if not self.live:
            return []
        chosen = rng.sample(self.live, min(len(self.live), 2 * count + 1))
        fit = [m for m in chosen if m.status is MemberStatus.ALIVE and m.advanced_at >= heard_since]
        return [m for m in fit if m.node_id != without][:count]


class PeerCycle:
    """The live members one after the other in an order shuffled anew for each turn (SWIM, section 4.3), so that each
    is met once a turn. Constant work per step, spread over the turn."""

    def __init__(self, table: MemberTable, rng: random.Random) -> None:
        self._table = table
        self._rng = rng
        self._order: list[str] = []

    def next(self) -> Member | None:
        """Who is next, or None while there is nobody. Who died since the turn began is passed over."""
        for _ in range(2):
            while self._order:
                member = self._table.members.get(self._order.pop())
                if member is not None and member.is_live:
                    return member
            self._order = [m.node_id for m in self._table.live]
            self._rng.shuffle(self._order)
        return None

    def take(self, count: int) -> list[Member]:
        """The next `count` different ones, fewer where there are not as many."""
        taken: dict[str, Member] = {}
        # At a turn's end the first of the next may repeat, so it may take some more steps.
        for _ in range(2 * count):
            member = self.next()
            if member is None or len(taken) >= min(count, len(self._table.live)):
                break
            taken[member.node_id] = member
        return list(taken.values())


def join_accusers(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """The smallest ACCUSERS_MAX of both: bounded, and the same in whatever order they come together."""
    return tuple(sorted({*a, *b})[:ACCUSERS_MAX])


def id_hash(node_id: str) -> int:
    """32 bits that stand for a node id in digests and accusations. Of two equal ones digests see the later alone; the
    exchange over peer links goes by names."""
    return zlib.crc32(node_id.encode()) & HASH_MAX


def own_member(node_id: str, generation: int, address: Address, boot_id: bytes, now: float) -> Member:
    """The row of the node itself, before its first publication."""
    return Member(Record(node_id, generation, 0, MemberStatus.ALIVE, address, boot_id=boot_id), now)
