"""Addresses to call again and again: seeds that no live member answers for, and members found dead.

Without the first a node started before its seeds stays alone; without the second a partition never heals."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from mesh.gossip_types import GossipConfig, SeedUnanswered
from mesh.membership import MemberTable
from mesh.outbox import Outbox
from mesh.view import Address, MemberStatus

CALLS_MAX = 128  # unanswered calls remembered; an answer to an older one is taken for a stranger's
# Nodes that are started together bind within it; a seed that is silent for longer is a wrong one, or down.
SEED_PATIENCE_S = 5.0
SEEDS_ADDED_MAX = 32  # while running, each called every few seconds for as long as nobody answers there


@dataclass(slots=True)
class Seed:
    """One address to join through."""

    address: Address
    called_at: float = float("-inf")
    join_sequence: int = 0  # of the last call, 0 once it was answered
    unanswered: int = 0  # calls since the last answer
    silent_since: float = 0.0  # the first of those calls
    is_lasting: bool = False  # told that this silence lasts
    node_id: str = ""  # who answered


class Contacts:
    """Who is called with a Join, and when."""

    def __init__(self, config: GossipConfig, table: MemberTable, seeds: Sequence[Address], rng: random.Random) -> None:
        self._config = config
        self._table = table
        # A node may be given its own address among the seeds: every node the same list.
        self._seeds = [Seed(a) for a in dict.fromkeys(seeds) if a != table.own.address]
        self._configured_count = len(self._seeds)
        self._sequence = rng.randrange(2**32)  # so that an answer to a former process fits no call of this one
        self._found: dict[Address, Address] = {}  # of seeds given by name; at most one each
        self._calls: OrderedDict[int, Address] = OrderedDict()  # unanswered ones by sequence, oldest first
        self._dead_at = float("inf")
        self._dead_order: list[str] = []
        self._died_at = float("-inf")

    def add(self, address: Address) -> None:
        """One more seed, first called with the next tick. Beyond SEEDS_ADDED_MAX the oldest added is called no more."""
        if address == self._table.own.address or any(seed.address == address for seed in self._seeds):
            return
        self._seeds.append(Seed(address))
        if len(self._seeds) > self._configured_count + SEEDS_ADDED_MAX:
            del self._seeds[self._configured_count]

    def next_wakeup(self) -> float:
        return min(self._dead_at, min((self._due(seed) for seed in self._seeds), default=float("inf")))

    def call(self, outbox: Outbox, now: float) -> None:
        """Call whoever is due, and report the seeds that did not answer the call before: the 1st, 2nd, 4th, … time,
        and once that it lasts. One at whose address a member has come since is not reported: nobody was there then."""
        due = [seed for seed in self._seeds if now >= self._due(seed)]
        live = {member.address: member.known_since for member in self._table.live} if due else {}
        for seed in due:
            before, seed.called_at = seed.called_at, now
            member = self._table.members.get(seed.node_id)
            if member is not None and member.is_live:
                continue  # looked at again after the next interval
            if live.get(self._found.get(seed.address, seed.address), float("-inf")) > before:
                seed.join_sequence = seed.unanswered = 0
                seed.is_lasting = False
            if seed.join_sequence:
                seed.unanswered += 1
                if seed.unanswered == 1:
                    seed.silent_since = before
                if not seed.is_lasting and now - seed.silent_since >= SEED_PATIENCE_S:
                    seed.is_lasting = True
                    outbox.emit(SeedUnanswered(seed.address, seed.unanswered, is_lasting=True))
                elif seed.unanswered & (seed.unanswered - 1) == 0:
                    outbox.emit(SeedUnanswered(seed.address, seed.unanswered))
            seed.join_sequence = self._new_call(seed.address)
            outbox.send_join(seed.address, seed.join_sequence, now, None)
        if now >= self._dead_at:
            self._call_dead(outbox, now)

    def answered(self, join_sequence: int, node_id: str) -> bool:
        """A Delta that names a call. True the first time for one call to a seed."""
        self._calls.pop(join_sequence, None)
        for seed in self._seeds:
            if join_sequence and seed.join_sequence == join_sequence:
                seed.join_sequence = seed.unanswered = 0
                seed.is_lasting = False
                seed.node_id = node_id
                return True
        return False

    def is_called(self, join_sequence: int) -> bool:
        """A call of this sequence waits for its answer."""
        return join_sequence in self._calls

    def call_to(self, address: Address) -> int:
        """The sequence of the latest call to an address that waits for its answer; 0 for none."""
        found = self._found
        return next((s for s, called in reversed(self._calls.items()) if address in (called, found.get(called))), 0)

    def found(self, seed: Address, address: Address) -> None:
        """A seed given by host name was called at this address."""
        if any(known.address == seed for known in self._seeds):
            self._found[seed] = address

    def died(self, now: float) -> None:
        """Somebody was found dead: call soon, because a restart follows a crash."""
        self._died_at = now
        self._dead_at = min(self._dead_at, now + self._config.dead_recent_interval_s)

    def _call_dead(self, outbox: Outbox, now: float) -> None:
        """One of the dead after the other, in turns over all of them."""
        members, config = self._table.members, self._config
        if not self._dead_order:
            self._dead_order = list(self._table.dead)
        if not self._dead_order:
            self._dead_at = float("inf")  # until somebody dies
            return
        is_recent = now - self._died_at < config.recent_death_s
        interval_s = config.dead_recent_interval_s if is_recent else config.dead_interval_s
        self._dead_at = now + max(config.dead_spacing_s, interval_s / max(1, len(self._table.dead)))
        member = members.get(self._dead_order.pop())
        if member is not None and member.status is MemberStatus.DEAD:
            outbox.send_join(member.address, self._new_call(member.address), now, member)

    def _new_call(self, address: Address) -> int:
        """Its sequence."""
        self._sequence += 1
        self._calls[self._sequence] = address
        if len(self._calls) > CALLS_MAX:
            self._calls.popitem(last=False)
        return self._sequence

    def _due(self, seed: Seed) -> float:
        is_alone = not self._table.live
        return seed.called_at + (self._config.seed_alone_interval_s if is_alone else self._config.seed_interval_s)
