"""What to tell, whom and how fast: rumours by recency, and a budget of packets and bytes."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from mesh.membership import MemberTable

# Of the room for records, what urgent news may take while loads wait as well: neither starves the other.
URGENT_SHARE = 0.75
# Of what room is left then, what changed loads may take while signs of life wait.
LOADS_SHARE = 0.75
# A record that does not fit is passed over for a smaller one, this many times; then the packet is full enough.
MISFITS_MAX = 3
# So many are looked at for one packet, those passed over included, however many wait.
SCANNED_MAX = 128
RECORD_BYTES_MIN = 24  # no record with a load is smaller
SIGN_BYTES_MIN = 8  # no sign of life is, but for one member in 2^48


@dataclass(slots=True)
class Taken:
    """News for one packet, encoded. room_bytes: what they leave of the room."""

    room_bytes: int
    records: list[bytes] = field(default_factory=list)
    signs: list[bytes] = field(default_factory=list)


class Rumours:
    """News to pass on, most recent first, each a bounded number of times. At most one entry a member in each class.

    Urgent: membership, readiness and profiles. Loads: those that changed. Signs: newer versions of the same load, which
    say only that the member lives, told as signs of life (mesh.signs) where it is known since when it is the same.
    """

    def __init__(self, table: MemberTable, retransmit_max: int) -> None:
        self._table = table
        self._retransmit_max = retransmit_max
        self.urgent_tellings = 0  # urgent records told so far
        self._urgent: OrderedDict[str, int] = OrderedDict()  # id to tellings left
        self._with_warm: set[str] = set()  # of those, whose profile is part of the news
        self._loads: OrderedDict[str, int] = OrderedDict()
        self._signs: OrderedDict[str, int] = OrderedDict()

    def add_urgent(self, node_id: str, *, with_warm: bool) -> None:
        """News that no publication replaces, so they are told the logarithm of the members times as often, as in SWIM:
        four tellings each leave out one member in fifty."""
        self._urgent[node_id] = self._retransmit_max * self._tenfolds
        self._urgent.move_to_end(node_id)
        if with_warm:
            self._with_warm.add(node_id)
        self._with_warm.difference_update(self._shed(self._urgent))

    def add_load(self, node_id: str, *, is_changed: bool) -> None:
        """A changed load is told as often as urgent news, since the signs of life that follow do not carry it. A sign
        is told 2 x retransmit_max times, since it is small; half as often left out one member in a hundred of 60."""
        waiting, tellings = self._signs, self._retransmit_max * 2
        if is_changed:
            self._signs.pop(node_id, None)
            waiting, tellings = self._loads, self._retransmit_max * self._tenfolds
        elif node_id in self._loads:  # still on its way as a change, whatever newer version carries it
            waiting, tellings = self._loads, self._loads[node_id]
        waiting[node_id] = tellings
        waiting.move_to_end(node_id)
        self._shed(waiting)

    def _shed(self, waiting: OrderedDict[str, int]) -> list[str]:
        """Drop the oldest news beyond one a member: more can wait only where some are of members since forgotten."""
        shed = []
        while len(waiting) > len(self._table.members):
            shed.append(waiting.popitem(last=False)[0])
        return shed

    @property
    def _tenfolds(self) -> int:
        return math.ceil(math.log10(len(self._table.live) + 2))

    @property
    def has_urgent(self) -> bool:
        return bool(self._urgent)

    @property
    def has_changes(self) -> bool:
        """More than signs of life waits."""
        return bool(self._urgent or self._loads)

    @property
    def waiting_count(self) -> int:
        return len(self._urgent) + len(self._loads) + len(self._signs)

    def take_own(self) -> bytes:
        """The node's own record, which rides in every packet; with its profile while that is news."""
        own = self._table.own
        if own.node_id not in self._urgent:
            return own.encoded(with_warm=False)
        encoded = own.encoded(with_warm=own.node_id in self._with_warm)
        self._told(self._urgent, [own.node_id])
        return encoded

    def take(self, room_bytes: int, receiver_id: str) -> Taken:
        """News for one packet to one receiver, at most room_bytes together. Each class takes what room the ones before
        it leave; while less urgent ones wait it leaves some."""
        taken = Taken(room_bytes)
        waits = bool(self._loads or self._signs)
        self._choose(self._urgent, taken, URGENT_SHARE if waits else 1.0, receiver_id)
        self._choose(self._loads, taken, LOADS_SHARE if self._signs else 1.0, receiver_id)
        self._choose(self._signs, taken, 1.0, receiver_id)
        return taken

    def _choose(self, waiting: OrderedDict[str, int], taken: Taken, share: float, receiver_id: str) -> None:
        """Take what fits in that share of the room; it counts as told."""
        chosen: list[str] = []
        forgotten: list[str] = []
        misfits = 0
        members, own_id = self._table.members, self._table.own.node_id
        is_urgent, is_signs = waiting is self._urgent, waiting is self._signs
        kept = taken.room_bytes - int(taken.room_bytes * share)
        smallest = SIGN_BYTES_MIN if is_signs else RECORD_BYTES_MIN
        for node_id in islice(reversed(waiting), SCANNED_MAX):
            left = taken.room_bytes - kept
            if left < smallest:
                break
            member = members.get(node_id)
            if member is None:
                forgotten.append(node_id)
                continue
            if node_id in (receiver_id, own_id) or member.told_by == receiver_id:
                continue
            if not is_urgent and node_id in self._urgent:
                continue
            sign = member.encoded_sign() if is_signs else b""
            encoded = sign or member.encoded(with_warm=is_urgent and node_id in self._with_warm)
            if len(encoded) <= left:
                (taken.signs if sign else taken.records).append(encoded)
                taken.room_bytes -= len(encoded)
                chosen.append(node_id)
            else:
                misfits += 1
                if misfits >= MISFITS_MAX:
                    break
        for node_id in forgotten:
            del waiting[node_id]
            self._with_warm.discard(node_id)
        self._told(waiting, chosen)

    def _told(self, waiting: OrderedDict[str, int], node_ids: Sequence[str]) -> None:
        for node_id in node_ids:
            waiting[node_id] -= 1
            if waiting[node_id] <= 0:
                del waiting[node_id]
                if waiting is self._urgent:
                    self._with_warm.discard(node_id)
        if waiting is self._urgent:
            self.urgent_tellings += len(node_ids)


class PacketBudget:
    """Token buckets over packets and over bytes; the one of bytes holds a second's worth and may be overdrawn."""

    def __init__(self, rate: float, burst: int, byte_rate: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._level = float(burst)
        self._byte_rate = byte_rate
        self._bytes = byte_rate
        self._filled_at = now

    def take(self, now: float, *, reserve: int = 0) -> bool:
        """One packet, if more than `reserve` would be left without it."""
        passed_s = max(0.0, now - self._filled_at)
        self._level = min(self._burst, self._level + passed_s * self._rate)
        self._bytes = min(self._byte_rate, self._bytes + passed_s * self._byte_rate)
        self._filled_at = max(now, self._filled_at)
        if self._level < 1 + reserve:
            return False
        self._level -= 1
        return True

    def room_bytes(self, wanted: int) -> int:
        """How much of what is wanted the next packet may hold."""
        return max(0, min(wanted, int(self._bytes)))

    def spend(self, size_bytes: int) -> None:
        """A packet of this size was sent."""
        self._bytes -= size_bytes
