"""One node's part in the mesh: receive(), tick() and what is published in; effects and the view out. No I/O.

It joins the parts: the member table, the failure detector, the own state, the digests, and the outbox.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import assert_never

from mesh import exchange, packets, wire
from mesh.admission import Admission
from mesh.answers import Answers
from mesh.anti_entropy import DigestTurns
from mesh.contacts import Contacts
from mesh.errors import MalformedDatagram
from mesh.failure_detector import FailureDetector
from mesh.gossip_types import (
    DuplicateNode,
    Effect,
    ExchangeState,
    Fenced,
    GossipConfig,
    GossipStatistics,
    MemberChanged,
    PingLink,
    SeedUnanswered,
    SendDatagram,
    UsageHeard,
)
from mesh.identity import Claim, Identity
from mesh.member import Member, own_member, sign_record
from mesh.membership import NEWS, Change, MemberTable, PeerCycle, Plan
from mesh.outbox import Outbox
from mesh.own_state import OwnState
from mesh.pace import Pace
from mesh.reception import Reception
from mesh.seal import DatagramSealer, Keyring
from mesh.signs import Sign
from mesh.view import Address, ClusterView, MemberStatus, MemberView, NodeLoad, NodeProfile

__all__ = [
    "DuplicateNode",
    "Effect",
    "ExchangeState",
    "Fenced",
    "Gossip",
    "GossipConfig",
    "GossipStatistics",
    "MemberChanged",
    "PingLink",
    "SeedUnanswered",
    "SendDatagram",
    "UsageHeard",
]

LEAVE_PEERS_MAX = 12  # told of a leave by the leaver itself; the others hear of it from them
LEAVE_COPIES_PEERS = 6  # up to this many peers each is told twice: with few, one lost datagram is not made good in time
# In a large mesh building the view costs about 1.5 µs a member, so mere loads show up in it only this often.
VIEW_REUSE_S = 0.05
VIEW_REUSE_MEMBERS = 128


class Gossip:
    """The state of one node in the mesh.

    address: where peers reach it, an IP address. boot_id: 16 random bytes, new with each process. now: seconds on a
    monotonic clock, the same in every method. usage: OwnCounters.section, asked at each
    publication. Methods may be called in any order, with `now` never falling.
    Raises ValueError for an id that is empty or too long, or an address that is a host name."""

    def __init__(
        self,
        config: GossipConfig,
        node_id: str,
        generation: int,
        address: Address,
        seeds: tuple[Address, ...],
        keyring: Keyring,
        boot_id: bytes,
        rng: random.Random,
        now: float,
        *,
        usage: Callable[[float, int], bytes] = lambda now, bytes_max: b"",
    ) -> None:
        if not 0 < len(node_id.encode()) <= wire.NODE_ID_BYTES_MAX:
            raise ValueError(f"a node id is 1 to {wire.NODE_ID_BYTES_MAX} bytes, {node_id!r} is not")
        wire.pack_address(address)
        self.node_id = node_id
        self._config = config
        self._rng = rng
        self._own = own_member(node_id, generation, address, boot_id, now)
        self._table = MemberTable(self._own)
        self._pace = Pace(config, self._table)
        self._state = OwnState(config, self._pace, self._own, now, usage)
        self._identity = Identity(self._table, now)
        self._detector = FailureDetector(config, self._table, rng, now)
        self._contacts = Contacts(config, self._table, seeds, rng)
        self._digests = DigestTurns(config, self._table, rng, now)
        self._exchanges = exchange.ExchangeTurns(config, self._table, rng, now)
        self._sealer = DatagramSealer(keyring, boot_id)
        self._outbox = Outbox(config, self._table, self._sealer, now)
        self._answers = Answers(config, self._table, self._detector, self._contacts, self._digests, self._outbox, rng)
        secret = keyring.derive(keyring.primary_id, b"cookie|" + boot_id, salt=rng.randbytes(32))
        admission = Admission(secret, now)
        self._reception = Reception(self._sealer, admission, self._table, self._detector, self._contacts, self._answers)
        self._cycle = PeerCycle(self._table, rng)
        self._round_at = now + config.round_interval_s
        self._is_round_skipped = False
        self._untold: list[str] = []  # of the latest publication, where everybody is told: whom the budget left out
        self._urgent_at = float("inf")
        self._urgent_told_at = float("-inf")
        self._haste_at = float("inf")
        self._forget_at = now + config.tombstone_s
        self._seen_at = now
        self._has_ticked = False
        self._has_left = False
        self._is_fenced = False
        self._view: ClusterView | None = None
        self._view_is_wrong = False  # something changed that must show at once
        self._view_is_old = False  # loads and versions advanced
        self._probes = self._suspicions = self._deaths = self._stalls = self._exchanged = 0
        self.set_profile(NodeProfile(), now)

    # --- time ---

    def next_wakeup(self) -> float:
        """When tick() is due, on the clock of `now`; infinite after leave()."""
        if self._has_left:
            return float("inf")
        return min(
            self._state.publish_at,
            self._round_at if self._untold or len(self._table.live) > self._config.everyone_max else float("inf"),
            self._urgent_at,
            self._digests.next_at,
            self._exchanges.next_wakeup(),
            self._contacts.next_wakeup(),
            self._haste_at,
            self._forget_at,
            self._detector.next_wakeup(),
        )

    def tick(self, now: float) -> list[Effect]:
        """Everything that is due. Late calls are fine; one later than stall_s counts as a stall of this process."""
        if self._has_left:
            return []
        self._forgive_stall(now)
        self._has_ticked = True
        if now >= self._state.publish_at:
            self._publish(now)
        self._probe(now)
        for member in self._detector.due_deaths(now):
            self._deaths += 1
            self._accuse(member, MemberStatus.DEAD, now)
        self._contacts.call(self._outbox, now)
        peer = self._digests.due(now)
        if peer is not None:
            self._outbox.send(peer.address, self._digests.build(), now, is_filled=False)
        peer = self._exchanges.due(now)
        if peer is not None:
            question = exchange.encode_question(self._table)
            self._outbox.emit(ExchangeState(peer.node_id, peer.address, question))
        if now >= self._urgent_at:
            self._urgent_told_at = now
            has_more = self._outbox.tell_urgently(self._cycle.take(self._config.direct_peers), now)
            self._urgent_at = now + self._config.urgent_spacing_s if has_more else float("inf")
        if now >= self._round_at:
            self._tell_round(now)
        if now >= self._forget_at:
            self._forget_at = now + self._config.tombstone_s / 100
            self._view_is_wrong |= self._table.forget(now - self._config.tombstone_s)
        return self._outbox.drain()

    def _forgive_stall(self, now: float) -> None:
        late_s = now - max(self.next_wakeup(), self._seen_at)
        self._seen_at = now
        if not self._has_ticked or late_s <= self._config.stall_s:
            return
        self._stalls += 1
        self._table.postpone(late_s)
        self._detector.forgive()
        self._state.hurry(now)  # the others have not heard of this node either
        self._view_is_wrong = True

    def _publish(self, now: float) -> None:
        self._state.publish(now)
        self._view_is_old = True
        # Rounds keep step with publications, so that each takes the same time to arrive as the one before.
        self._round_at = now + self._config.round_interval_s
        live, config = self._table.live, self._config
        if len(live) <= config.everyone_max:
            self._untold = self._outbox.tell(live, now, is_urgent=True)
        else:
            self._outbox.tell(self._cycle.take(config.direct_peers), now, is_urgent=True)

    def _tell_round(self, now: float) -> None:
        self._round_at = now + self._config.round_interval_s
        if len(self._table.live) > self._config.everyone_max:
            self._untold = []
            # Where nothing changes, half the packets carry all signs of life.
            self._is_round_skipped = not (self._is_round_skipped or self._outbox.rumours.has_changes)
            if not self._is_round_skipped:
                self._outbox.tell(self._cycle.take(self._config.round_peers), now)
        else:
            known = (self._table.members.get(node_id) for node_id in self._untold)
            self._untold = self._outbox.tell([m for m in known if m is not None and m.is_live], now, is_urgent=True)

    def _probe(self, now: float) -> None:
        detector, outbox = self._detector, self._outbox
        for probe in detector.due_indirect(now):
            member = self._table.members.get(probe.node_id)
            if member is None:
                continue
            # Who was not heard lately may be dead as well, and its missing Nack would be held against this node.
            for helper in self._table.sample(
                self._rng, self._config.indirect_count, probe.node_id, heard_since=now - self._pace.evidence_age_s
            ):
                request = packets.PingRequest(probe.sequence, probe.node_id, member.address)
                probe.asked_count += outbox.send(helper.address, request, now, to=helper)
            outbox.emit(PingLink(member.node_id, member.address))
        for member in detector.due_verdicts(now):
            self._suspicions += 1
            self._accuse(member, MemberStatus.SUSPECT, now)
        for relay in detector.due_nacks(now):
            outbox.send(relay.origin, packets.Nack(relay.origin_sequence), now)
        self._haste_at = float("inf")
        for probe in detector.begin(now):
            self._probes += 1
            member = self._table.members[probe.node_id]
            outbox.send(member.address, packets.Ping(probe.sequence, probe.node_id), now, to=member)

    # --- what this node says of itself ---

    def set_load(self, load: NodeLoad, now: float) -> None:
        """What to publish from now on. A jump goes out with the next tick, which is due at once then.

        Raises ValueError for a load that no datagram holds; the former one stays."""
        self._state.set_load(load, now)
        self._view_is_wrong = True

    def set_profile(self, profile: NodeProfile, now: float) -> None:
        """Publish another profile with the next tick, which is due at once then.

        Raises ValueError for a profile that no datagram holds; the former one stays."""
        if self._state.set_profile(profile, now):
            self._outbox.rumours.add_urgent(self.node_id, with_warm=True)
            self._view_is_wrong = True

    def set_bulk(self, bulk: bytes, now: float) -> None:
        """Publish these bytes beside the load, as often as a load that changes; to all of the mesh, as they are.

        Raises ValueError for more than BULK_BYTES_MAX; the former ones stay."""
        self._state.set_bulk(bulk, now)

    def usage_changed(self, now: float) -> None:
        """The next usage section holds what others must know soon: publish as soon as the packet budget allows."""
        self._state.hurry_usage(now)

    @property
    def own_version(self) -> int:
        """Of the latest publication."""
        return self._own.version

    def add_seed(self, address: Address, now: float) -> None:
        """Call this address as a configured seed is called, first with the next tick, which is due at once then."""
        self._contacts.add(address)

    def seed_found(self, seed: Address, address: Address) -> None:
        """A call to a seed given by host name went to this address."""
        self._contacts.found(seed, address)

    def forget(self, node_id: str, now: float) -> bool:
        """Make a DEAD member one that LEFT, here and by rumour everywhere: it no longer counts and is not called again.
        A newer life of it is believed as before. False, with nothing changed, for one that is not DEAD or not known."""
        member = self._table.members.get(node_id)
        if member is None or member.status is not MemberStatus.DEAD:
            return False
        self._accuse(member, MemberStatus.LEFT, now)
        return True

    def leave(self, now: float) -> list[Effect]:
        """Say farewell. After it nothing is received, sent or due."""
        if self._has_left:
            return []
        self._state.leave()
        peers = self._rng.sample(self._table.live, min(len(self._table.live), LEAVE_PEERS_MAX))
        for _ in range(2 if len(peers) <= LEAVE_COPIES_PEERS else 1):
            for peer in peers:
                self._outbox.send(peer.address, packets.Leave(), now, to=peer, is_unlimited=True)
        self._has_left = True
        self._view_is_wrong = True
        return self._outbox.drain()

    # --- receiving ---

    def receive(self, datagram: bytes, source: Address, now: float) -> list[Effect]:
        """Take in one datagram, whatever its bytes. One that is rejected changes nothing but its count."""
        if self._has_left:
            return []
        arrival = self._reception.let_in(datagram, source, now)
        if arrival is None:
            return self._outbox.drain()
        packet = arrival.packet
        self._forgive_stall(now)
        if isinstance(packet.message, packets.Conflict):
            self._be_refused(packet.message, now)
        elif packet.sender == self.node_id:
            # A former process of this very node speaks from the same address; anything else is a second one.
            if source != self._own.address:
                self._report_duplicate(self.node_id, source, now)
                self._answers.answer_second_process(packet, self._own, source, now)
        elif self._identity.is_second_process(packet, arrival.boot_id, source, now):
            self._report_duplicate(packet.sender, source, now)
            self._answers.answer_second_process(packet, self._table.members[packet.sender], source, now)
        else:
            self._take(arrival.plans, packet.sender, now)
            self._take_signs(packet.signs, packet.sender, now)
            for record in packet.records:
                if record.node_id == self.node_id:
                    self._hear_about_self(record, source, now)
            if self._answers.answer(packet, source, now):
                self._exchanges.want(packet.sender, now)
        return self._outbox.drain()

    def _take(self, plans: Iterable[Plan | None], sender: str, now: float) -> None:
        """Merge what came together from one peer."""
        merged: set[str] = set()
        for plan in plans:
            # There may be two records of one member; the second was compared before the first was merged.
            current = self._table.plan(plan.record) if plan and plan.record.node_id in merged else plan
            if current is None or self._identity.is_held_back(current.record, now):
                continue
            merged.add(current.record.node_id)
            self._merge(current, sender, now)

    def _take_signs(self, signs: Iterable[Sign], sender: str, now: float) -> None:
        for sign in signs:
            member = self._table.news_in(sign)
            if member is None:
                continue
            plan = self._table.plan(sign_record(member, sign))
            if plan is not None:
                self._merge(plan, sender, now)
            member.know_unchanged(sign)
            if member.lacks_load and member.is_live:
                self._digests.hurry(member, now)

    # --- comparing everything over a peer link ---

    def answer_exchange(self, question: bytes, now: float) -> bytes:
        """A peer's question, and what to answer. Raises MalformedDatagram."""
        return exchange.answer(self._table, question, now)

    def take_exchange(self, node_id: str, answer: bytes, now: float) -> list[Effect]:
        """What a member answered. A malformed answer changes nothing but its count."""
        self._exchanges.ended(node_id)
        if self._has_left:
            return []
        try:
            told = exchange.decode_answer(answer)
            plans = [self._table.plan(t.record) for t in told if t.record.node_id != self.node_id]
        except MalformedDatagram:
            self._reception.rejects["malformed"] += 1
            return []
        self._exchanged += 1
        gone_s = {t.record.node_id: t.gone_s for t in told if t.gone_s is not None}
        others: list[Plan | None] = []
        for plan in plans:
            if plan is None or not plan.change & Change.NEW or plan.record.node_id not in gone_s:
                others.append(plan)
                continue
            # Remembered no longer than by who told of it, and told to nobody, or it never would be forgotten.
            age_s = gone_s[plan.record.node_id]
            if age_s < self._config.tombstone_s and plan.record.node_id not in self._table.members:
                self._view_is_wrong |= self._table.bury(plan, now - age_s, now)
        self._take(others, node_id, now)
        member = self._table.members.get(node_id)
        for record in [t.record for t in told]:
            if record.node_id == self.node_id and member is not None:
                self._hear_about_self(record, member.address, now)
        return self._outbox.drain()

    def exchange_failed(self, node_id: str) -> None:
        """No answer came; the next exchange is with another."""
        self._exchanges.ended(node_id)

    def _be_refused(self, conflict: packets.Conflict, now: float) -> None:
        self._report_duplicate(self.node_id, conflict.address, now)
        if self._identity.refused(conflict.known_ms, self._detector.answered_at, now) and not self._is_fenced:
            self._is_fenced = True
            self._outbox.emit(Fenced(conflict.address))

    def _merge(self, plan: Plan, told_by: str, now: float) -> None:
        """Take in what a record changes: pass it on, watch it, report it."""
        change = plan.change
        known = self._table.members.get(plan.record.node_id)
        before: MemberView | None = known.view(now, is_self=False) if known is not None and change & NEWS else None
        former_hot = known.hot if known is not None else None
        member = self._table.apply(plan, now, told_by=told_by)
        if member is None:
            return
        if plan.record.boot_id and plan.record.boot_id == member.boot_id:
            self._reception.vouch(member.boot_id, member.address)
        rumours = self._outbox.rumours
        if change & NEWS or change & Change.ACCUSED:
            is_told_in_full = bool(change & (Change.NEW | Change.GENERATION | Change.PROFILE))
            rumours.add_urgent(member.node_id, with_warm=is_told_in_full)
            self._urgent_at = min(self._urgent_at, max(now, self._urgent_told_at + self._config.urgent_spacing_s))
            self._view_is_wrong = True
        else:
            rumours.add_load(member.node_id, is_changed=member.hot != former_hot or bool(change & Change.BULK))
            self._view_is_old = True
        if plan.load is not None and plan.load.usage and member.hot != former_hot:
            self._outbox.emit(UsageHeard(member.node_id, plan.load.usage))
        if member.status is MemberStatus.SUSPECT and change & (Change.STATUS | Change.ACCUSED | Change.ADVANCED):
            self._detector.watch(member)
            if change & Change.STATUS and self._detector.wants_to_confirm(member):
                self._haste_at = now
        if not member.is_live and change & (Change.STATUS | Change.NEW):
            self._contacts.died(now)
        if member.is_live and member.warm_version > member.profile_version:
            self._digests.hurry(member, now)
        if member.is_live and member.bulk_version_heard > member.bulk_version:
            self._exchanges.want(member.node_id, now + self._config.bulk_patience_s)
        if before is not None and before.status is MemberStatus.DEAD and member.is_live:
            self._exchanges.want(member.node_id, now)  # what it has seen meanwhile, as after a partition
        if change & NEWS:
            self._outbox.emit(MemberChanged(before, member.view(now, is_self=False)))

    def _accuse(self, member: Member, status: MemberStatus, now: float) -> None:
        """This node's own verdict on a member: SUSPECT or DEAD at the version it knows."""
        accusers = self._detector.accusers_with_own(member) if status is MemberStatus.SUSPECT else ()
        plan = self._table.plan(member.accusation(status, accusers))
        if plan is not None:
            self._merge(plan, "", now)

    def _hear_about_self(self, record: packets.Record, source: Address, now: float) -> None:
        if record.generation >= wire.GENERATION_MAX or record.version >= wire.VERSION_MAX:
            return  # no process lived or published so often, and there would be no outdoing it
        claim = self._identity.judge(record, now)
        match claim:
            case Claim.KNOWN:
                return
            case Claim.ACCUSES | Claim.BEHIND:
                if claim is Claim.ACCUSES:
                    self._detector.adjust_awareness(1)  # Lifeguard: to be suspected speaks against oneself
                    self._state.outdo(record.generation, record.version, now)
                self._outbox.send(source, packets.Rumour(), now)  # who has not heard the newer version is told directly
            case Claim.FORMER_LIFE:
                self._state.outdo(record.generation + 1, 0, now)
                self._outbox.rumours.add_urgent(self.node_id, with_warm=True)
            case Claim.RIVAL:
                self._report_duplicate(self.node_id, record.address, now)
            case _:
                assert_never(claim)
        self._view_is_wrong = True

    def _report_duplicate(self, node_id: str, address: Address, now: float) -> None:
        report = self._identity.report(node_id, address, now)
        if report is not None:
            self._outbox.emit(report)

    # --- evidence from the peer links ---

    def link_answered(self, node_id: str, now: float) -> None:
        """The member answered over its link, so no probe under way may accuse it."""
        self._detector.answered_otherwise(node_id)

    def link_failed(self, node_id: str, now: float) -> None:
        """The link to the member broke or did not answer: probe it with the next tick, which is due at once then."""
        member = self._table.members.get(node_id)
        if member is not None and member.is_live and member is not self._own and self._detector.hasten(node_id):
            self._haste_at = min(self._haste_at, now)

    def observe_load(self, node_id: str, load: NodeLoad, now: float) -> None:
        """A fresher load that rode on a link frame; a publication replaces it that was made after it."""
        member = self._table.members.get(node_id)
        if member is not None and member.is_live and member is not self._own:
            member.load, member.load_at = load, now
            self._view_is_old = True

    # --- what others read ---

    def view(self, now: float) -> ClusterView:
        """The members as of now. The same object as before where nothing changed and no time passed to speak of."""
        former = self._view
        if former is not None and not self._view_is_wrong and now - former.now < VIEW_REUSE_S:
            is_large = len(former.members) > VIEW_REUSE_MEMBERS
            if is_large or not self._view_is_old:
                return former
        self._view = ClusterView(
            self_id=self.node_id,
            now=now,
            members=MappingProxyType({i: m.view(now, is_self=m is self._own) for i, m in self._table.members.items()}),
            awareness=self._detector.awareness,
            publish_interval_s=self._pace.publish_interval_s,
        )
        self._view_is_wrong = self._view_is_old = False
        return self._view

    def statistics(self) -> GossipStatistics:
        """Counts as of now, independent of later ones."""
        return GossipStatistics(
            packets_sent=MappingProxyType(dict(self._outbox.sent)),
            packets_received=MappingProxyType(dict(self._reception.received)),
            packets_withheld=self._outbox.withheld,
            packets_unlimited=self._outbox.unlimited,
            bytes_sent=self._outbox.bytes_sent,
            bytes_received=self._reception.bytes_received,
            rejects=MappingProxyType(dict(self._reception.rejects)),
            strangers=self._reception.strangers,
            probes=self._probes,
            suspicions=self._suspicions,
            refutations=self._state.refutations,
            deaths=self._deaths,
            stalls=self._stalls,
            duplicates=self._identity.count,
            exchanges=self._exchanged,
            members_refused=self._table.refused,
            awareness=self._detector.awareness,
            members=len(self._table.members),
            rumours_waiting=self._outbox.rumours.waiting_count,
            suspicions_watched=self._detector.watched_count,
        )
