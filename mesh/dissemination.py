"""What to tell and how fast: rumours by recency, and a packet budget."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Container, Sequence

from mesh.membership import MemberTable

# Of the room for records, what urgent news may take while loads wait as well: neither starves the other.
URGENT_SHARE = 0.75
# A record that does not fit is passed over for a smaller one, this many times; then the packet is full enough.
MISFITS_MAX = 3
RECORD_BYTES_MIN = 24  # no record with a load is smaller


class Rumours:
    """News to pass on, most recent first, each a bounded number of times. At most one entry a member in each of both.

    Urgent: membership, readiness and profiles. Loads: everything else that a newer version brings."""

    def __init__(self, table: MemberTable, retransmit_max: int) -> None:
        self._table = table
        self._retransmit_max = retransmit_max
        self.urgent_tellings = 0  # urgent records told so far
        self._urgent: OrderedDict[str, int] = OrderedDict()  # id to tellings left
        self._with_warm: set[str] = set()  # of those, whose profile is part of the news
        self._loads: OrderedDict[str, int] = OrderedDict()

    def add_urgent(self, node_id: str, *, with_warm: bool) -> None:
        """News that no publication replaces, so they are told the logarithm of the members times as often, as in SWIM:
        four tellings each leave out one member in fifty."""
        self._urgent[node_id] = self._retransmit_max * math.ceil(math.log10(len(self._table.live) + 2))
        self._urgent.move_to_end(node_id)
        if with_warm:
            self._with_warm.add(node_id)
        self._with_warm.difference_update(self._shed(self._urgent))

    def add_load(self, node_id: str) -> None:
        self._loads[node_id] = self._retransmit_max
        self._loads.move_to_end(node_id)
        self._shed(self._loads)

    def _shed(self, waiting: OrderedDict[str, int]) -> list[str]:
        """Drop the oldest news beyond one a member: more can wait only where some are of members since forgotten."""
        shed = []
        while len(waiting) > len(self._table.members):
            shed.append(waiting.popitem(last=False)[0])
        return shed

    @property
    def has_urgent(self) -> bool:
        return bool(self._urgent)

    @property
    def waiting_count(self) -> int:
        return len(self._urgent) + len(self._loads)

    def take_own(self) -> bytes:
        """The node's own record, which rides in every packet; with its profile while that is news."""
        own = self._table.own
        if own.node_id not in self._urgent:
            return own.encoded(with_warm=False)
        encoded = own.encoded(with_warm=own.node_id in self._with_warm)
        self._told(self._urgent, [own.node_id])
        return encoded

    def take(self, room_bytes: int, receiver_id: str) -> list[bytes]:
        """Encoded records for one packet to one receiver, at most room_bytes together."""
        urgent_room = int(room_bytes * URGENT_SHARE) if self._loads else room_bytes
        chosen, left = self._choose(self._urgent, urgent_room, receiver_id, ())
        loads, _ = self._choose(self._loads, room_bytes - urgent_room + left, receiver_id, self._urgent)
        records = [self._table.members[i].encoded(with_warm=i in self._with_warm) for i in chosen]
        records += [self._table.members[i].encoded(with_warm=False) for i in loads]
        self._told(self._urgent, chosen)
        self._told(self._loads, loads)
        return records

    def _choose(
        self,
        waiting: OrderedDict[str, int],
        room_bytes: int,
        receiver_id: str,
        without: Container[str],
    ) -> tuple[list[str], int]:
        """(ids that fit, bytes left)."""
        chosen: list[str] = []
        forgotten: list[str] = []
        misfits = 0
        is_urgent = waiting is self._urgent
        for node_id in reversed(waiting):
            if room_bytes < RECORD_BYTES_MIN:
                break
            member = self._table.members.get(node_id)
            if member is None:
                forgotten.append(node_id)
                continue
            if node_id in (receiver_id, self._table.own.node_id) or node_id in without or member.told_by == receiver_id:
                continue
            size = len(member.encoded(with_warm=is_urgent and node_id in self._with_warm))
            if size <= room_bytes:
                chosen.append(node_id)
                room_bytes -= size
            else:
                misfits += 1
                if misfits >= MISFITS_MAX:
                    break
        for node_id in forgotten:
            del waiting[node_id]
            self._with_warm.discard(node_id)
        return chosen, room_bytes

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
    """A token bucket over packets."""

    def __init__(self, rate: float, burst: int, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._level = float(burst)
        self._filled_at = now

    def take(self, now: float, *, reserve: int = 0) -> bool:
        """One packet, if more than `reserve` would be left without it."""
        self._level = min(self._burst, self._level + max(0.0, now - self._filled_at) * self._rate)
        self._filled_at = max(now, self._filled_at)
        if self._level < 1 + reserve:
            return False
        self._level -= 1
        return True
