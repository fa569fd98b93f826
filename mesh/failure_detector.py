"""Who is asked whether it lives, and what follows: SWIM's probe cycle with Lifeguard's awareness and suspicion times.

SWIM: Das, Gupta, Motivala 2002. Lifeguard: Dadgar, Phillips, Currey 2017. One rule of our own: an unanswered probe
becomes a suspicion only if no newer version of the member came in since the probe began and the last one is over
`evidence_age_s` old, so that lost packets accuse nobody who is heard. Sends nothing: it says what is due.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import OrderedDict
from dataclasses import dataclass

from mesh.gossip_types import GossipConfig
from mesh.member import Member, join_accusers
from mesh.membership import MemberTable, PeerCycle
from mesh.pace import Pace
from mesh.view import Address, MemberStatus

AWARENESS_MAX = 8  # Lifeguard's limit: probes wait at most nine times as long
PROBES_MAX = 16  # at one time; one a second, each ended within a few
RELAYS_MAX = 64  # pings on behalf of others at one time; beyond it the oldest is dropped without an answer
SUSPICION_STEADY_MEMBERS = 10  # up to so many, refutations take no longer than between two
HASTY_MAX = 16  # members to be probed before their turn; beyond it they wait for their turn
CONFIRMERS = 6  # of all who hear of a suspicion; twice what confirms it in full, some are wanting
STALEST_OF = 64  # members of which the one longest unheard is probed
# Of the direct timeout: who pings for another says so before that other's own verdict.
NACK_FRACTION = 0.8


@dataclass(slots=True)
class Probe:
    """One question to one member."""

    sequence: int
    node_id: str
    generation: int
    version: int  # the newest known when it began
    indirect_at: float
    verdict_at: float
    is_indirect: bool = False
    asked_count: int = 0  # peers asked to ping for us
    nack_count: int = 0


@dataclass(frozen=True, slots=True)
class Relay:
    """A ping this node sent for another."""

    origin: Address
    origin_sequence: int
    node_id: str
    nack_at: float


class FailureDetector:
    """Probes, relays and suspicion times over one member table."""

    def __init__(self, config: GossipConfig, table: MemberTable, rng: random.Random, now: float) -> None:
        self.awareness = 0
        self.answered_at = float("-inf")  # when a member last answered a probe of this node
        self._config = config
        self._table = table
        self._rng = rng
        self._pace = Pace(config, table)
        self._cycle = PeerCycle(table, rng)
        self._sequence = rng.randrange(2**32)  # so that an answer to a former process fits no probe of this one
        self._probes: dict[int, Probe] = {}
        self._probed_at: dict[str, float] = {}  # of probes in flight only
        self._relays: OrderedDict[int, Relay] = OrderedDict()
        self._hasty: OrderedDict[str, None] = OrderedDict()
        self._probe_at = now + rng.random() * config.probe_interval_s
        self._was_stalest = False
        self._expiries: list[tuple[float, str]] = []  # heap; a superseded entry is passed over when its time comes
        self._watched: dict[str, float] = {}  # of each member watched, its entry that is not superseded

    def next_wakeup(self) -> float:
        due = self._probe_at
        for probe in self._probes.values():
            due = min(due, probe.verdict_at if probe.is_indirect else probe.indirect_at)
        for relay in self._relays.values():
            due = min(due, relay.nack_at)
        if self._expiries:
            due = min(due, self._expiries[0][0])
        return due

    # --- probes ---

    def begin(self, now: float) -> list[Probe]:
        """The probes to send now: who is in haste, and one a probe interval."""
        chosen = [self._table.members[node_id] for node_id in self._hasty if node_id in self._table.members]
        self._hasty.clear()
        if now >= self._probe_at:
            self._probe_at = now + self._config.probe_interval_s
            turn = self._next_in_turn(now)
            if turn is None:
                self.adjust_awareness(-1)  # nobody to ask: nothing speaks against this node any more
            else:
                chosen.append(turn)
        return [self._begin_one(m, now) for m in chosen if m.is_live and self._may_probe(m)]

    def _next_in_turn(self, now: float) -> Member | None:
        """Every other time the member longest unheard, if its publication is overdue; else the next of the cycle."""
        stalest = self._stalest_of_some()
        self._was_stalest = (
            not self._was_stalest
            and stalest is not None
            and now - stalest.advanced_at > self._pace.overdue_s
            and stalest.status is MemberStatus.ALIVE
            and self._may_probe(stalest)
        )
        return stalest if self._was_stalest else self._cycle.next()

    def _stalest_of_some(self) -> Member | None:
        """The member longest unheard, in a large mesh among a random part: who has learnt of many at one time knows
        them all in the same order as others, and all would probe the first of them at once."""
        live = self._table.live
        if len(live) <= STALEST_OF:
            return self._table.stalest()
        return min(self._rng.sample(live, STALEST_OF), key=lambda member: member.advanced_at)

    def _may_probe(self, member: Member) -> bool:
        return member.node_id not in self._probed_at and len(self._probes) < PROBES_MAX

    def _begin_one(self, member: Member, now: float) -> Probe:
        # Lifeguard: a node that doubts itself waits longer for answers. Unlike there it asks as often as before, or
        # it would need a minute of answers to trust itself again after a partition.
        slowness = 1 + self.awareness
        probe = Probe(
            self.next_sequence(),
            member.node_id,
            member.generation,
            member.version,
            indirect_at=now + self._config.direct_timeout_s * slowness,
            verdict_at=now + self._config.verdict_timeout_s * slowness,
        )
        self._probes[probe.sequence] = probe
        self._probed_at[member.node_id] = now
        return probe

    def hasten(self, node_id: str) -> bool:
        """Probe a member before its turn. False where one is under way already or too many are waiting."""
        if node_id in self._probed_at or node_id in self._hasty or len(self._hasty) >= HASTY_MAX:
            return False
        self._hasty[node_id] = None
        return True

    def answered(self, sequence: int, node_id: str, now: float) -> bool:
        """An Ack. True if it ended a probe."""
        probe = self._probes.get(sequence)
        if probe is None or probe.node_id != node_id:
            return False
        self.answered_at = now
        self._end(probe)
        self.adjust_awareness(-1)
        return True

    def answered_otherwise(self, node_id: str) -> None:
        """Sign of life over another way: ends the probe without a verdict."""
        for probe in [p for p in self._probes.values() if p.node_id == node_id]:
            self._end(probe)

    def nacked(self, sequence: int) -> None:
        probe = self._probes.get(sequence)
        if probe is not None:
            probe.nack_count = min(probe.nack_count + 1, probe.asked_count)

    def due_indirect(self, now: float) -> list[Probe]:
        """Probes unanswered past the direct timeout; the caller asks others and notes how many in asked_count."""
        due = [p for p in self._probes.values() if not p.is_indirect and now >= p.indirect_at]
        for probe in due:
            probe.is_indirect = True
        return due

    def due_verdicts(self, now: float) -> list[Member]:
        """Ends the probes whose time is over; returns the members to suspect."""
        accused = []
        for probe in [p for p in self._probes.values() if p.is_indirect and now >= p.verdict_at]:
            member = self._table.members.get(probe.node_id)
            if member is None or not member.is_live:
                self._end(probe)
                continue
            if (member.generation, member.version) > (probe.generation, probe.version):
                self._end(probe)  # it lives, whatever became of the probe
                continue
            if now < (evidence_until := member.advanced_at + self._pace.evidence_age_s):
                probe.verdict_at = evidence_until  # heard too lately to be accused: wait for its next word
                continue
            self._end(probe)
            # Lifeguard: a missing Nack speaks against this node's own network as much as against the member.
            self.adjust_awareness(probe.asked_count - probe.nack_count if probe.asked_count else 1)
            accused.append(member)
        return accused

    def _end(self, probe: Probe) -> None:
        del self._probes[probe.sequence]
        del self._probed_at[probe.node_id]

    def adjust_awareness(self, change: int) -> None:
        self.awareness = min(AWARENESS_MAX, max(0, self.awareness + change))

    def next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence

    # --- pings for others ---

    def relay(self, origin: Address, origin_sequence: int, node_id: str, now: float) -> int:
        """Note a ping to be sent for another; returns its sequence."""
        if len(self._relays) >= RELAYS_MAX:
            self._relays.popitem(last=False)
        sequence = self.next_sequence()
        nack_at = now + self._config.direct_timeout_s * NACK_FRACTION
        self._relays[sequence] = Relay(origin, origin_sequence, node_id, nack_at)
        return sequence

    def is_asked(self, sequence: int, node_id: str) -> bool:
        """A ping of this sequence to this member waits for its answer, for this node or for another."""
        probe, relay = self._probes.get(sequence), self._relays.get(sequence)
        asked = probe or relay
        return asked is not None and asked.node_id == node_id

    def relay_answered(self, sequence: int, node_id: str) -> Relay | None:
        """The relay that an Ack ends, if any."""
        relay = self._relays.get(sequence)
        if relay is None or relay.node_id != node_id:
            return None
        return self._relays.pop(sequence)

    def due_nacks(self, now: float) -> list[Relay]:
        """Relays unanswered in time; they are over."""
        due = [sequence for sequence, relay in self._relays.items() if now >= relay.nack_at]
        return [self._relays.pop(sequence) for sequence in due]

    # --- suspicions ---

    def accusers_with_own(self, member: Member) -> tuple[int, ...]:
        """The accusers of a member once this node has joined them."""
        former = member.accusers if member.status is MemberStatus.SUSPECT else ()
        return join_accusers(former, (self._table.own.id_hash,))

    def watch(self, member: Member) -> None:
        """Call whenever a suspicion began or gained an accuser.

        Only an earlier end takes room: who is suspected anew each second is looked at when the first one is over."""
        expires_at = self.expires_at(member)
        if expires_at < self._watched.get(member.node_id, math.inf):
            self._watched[member.node_id] = expires_at
            heapq.heappush(self._expiries, (expires_at, member.node_id))

    def wants_to_confirm(self, member: Member) -> bool:
        """Whether this node, which just heard that the member is suspected, should ask it at once and not in its turn.

        In a large mesh few would ask it before the suspicion runs out, so of all who hear CONFIRMERS do by chance: they
        confirm, or tell it to refute. In a small one all ask whom they have not heard anyway."""
        count = len(self._table.live)
        return count > STALEST_OF and self._rng.random() < CONFIRMERS / count and self.hasten(member.node_id)

    @property
    def watched_count(self) -> int:
        return len(self._expiries)

    def expires_at(self, member: Member) -> float:
        """When a suspicion becomes a death unless refuted.

        Lifeguard: from suspicion_max_factor times the minimum down to it, by the logarithm of independent
        confirmations; where nobody else is there to confirm, the minimum at once. The minimum grows with the logarithm
        of the members, as the way of a refutation does, but less than in Lifeguard, where only the accused refutes."""
        others = len(self._table.live) + 1
        tenfolds = max(0.0, math.log10(others / SUSPICION_STEADY_MEMBERS))
        minimum_s = self._config.suspicion_min_s * (1.0 + self._config.suspicion_growth * tenfolds)
        if others - 2 < self._config.confirmations:
            return member.suspected_at + minimum_s
        maximum_s = minimum_s * self._config.suspicion_max_factor
        confirmed = math.log(len(member.accusers) or 1) / math.log(self._config.confirmations + 1)
        return member.suspected_at + max(minimum_s, maximum_s - (maximum_s - minimum_s) * confirmed)

    def due_deaths(self, now: float) -> list[Member]:
        """Members whose suspicion ran out."""
        dead: dict[str, Member] = {}
        while self._expiries and self._expiries[0][0] <= now:
            expires_at, node_id = heapq.heappop(self._expiries)
            if self._watched.get(node_id) != expires_at:
                continue
            del self._watched[node_id]
            member = self._table.members.get(node_id)
            if member is None or member.status is not MemberStatus.SUSPECT:
                continue
            if self.expires_at(member) <= now:
                dead[node_id] = member
            else:
                self.watch(member)
        return list(dead.values())

    def forgive(self) -> None:
        """This node stood still: answers may lie unread. No probe under way is held against anybody."""
        self._probes.clear()
        self._probed_at.clear()
        self._relays.clear()
        self.adjust_awareness(1)
