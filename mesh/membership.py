"""The member table. The only place that compares claims; sees no socket, no clock and no randomness but a given one.

The state version is the incarnation: a node owns (generation, version) and raises the version with all it publishes, so
whatever shows a newer version is a sign of life. Of two claims the greater (generation, version, status) holds, with
ALIVE < SUSPECT < DEAD < LEFT: a suspicion says "no life after version v", and any newer version refutes it, wherever it
comes from. Sections merge by their own versions within the generation. So merging is a join: commutative, associative,
idempotent.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from mesh.member import Member, join_accusers
from mesh.packets import Record
from mesh.signs import Sign
from mesh.state import decode_load, decode_profile
from mesh.view import MemberStatus, NodeLoad, NodeProfile

MEMBERS_MAX = 16_384  # in the table, tombstones included; about 2 KiB each
TOMBSTONES_MAX = 4_096  # beyond it the oldest is forgotten before its time


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
