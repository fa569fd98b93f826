"""One node's part in the mesh: receive(), tick() and what is published in; effects and the view out. No I/O.

It joins the member table, the failure detector, the rumours and the digests, and keeps the node's own row: only this
file raises the own version, once a publication. Every datagram sent carries the own record, so each is a sign of life.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable
from types import MappingProxyType
from typing import assert_never

from mesh import wire
from mesh.anti_entropy import build_digest, compare
from mesh.dissemination import PacketBudget, Rumours, Seed, Seeds
from mesh.errors import MalformedDatagram, SealRejected
from mesh.failure_detector import FailureDetector
from mesh.gossip_types import (
    DuplicateNode,
    Effect,
    GossipConfig,
    GossipStatistics,
    MemberChanged,
    PingLink,
    SeedUnanswered,
    SendDatagram,
)
from mesh.membership import NEWS, Change, Member, MemberTable, PeerCycle, Plan, join_accusers, own_member
from mesh.seal import DatagramSealer, Keyring
from mesh.state import encode_load, encode_profile, is_urgent
from mesh.view import Address, ClusterView, MemberStatus, MemberView, NodeLoad, NodeProfile

__all__ = [
    "DuplicateNode",
    "Effect",
    "Gossip",
    "GossipConfig",
    "GossipStatistics",
    "MemberChanged",
    "PingLink",
    "SeedUnanswered",
    "SendDatagram",
]

DELTA_PACKETS_MAX = 4  # in one answer; what does not fit is found by the next digest, with another peer
LEAVE_PEERS_MAX = 12  # told of a leave by the leaver itself; the others hear of it from them
LEAVE_COPIES_PEERS = 6  # up to this many peers each is told twice: with few, one lost datagram is not made good in time
DUPLICATE_INTERVAL_S = 10.0  # between two reports of one duplicate id
DUPLICATES_MAX = 64  # ids for which the last report is remembered
# A claim about this node that it never made, and that nobody raises for this long, is of a former life of its own.
RIVAL_SILENT_S = 5.0
# In a large mesh building the view costs about 1.5 µs a member, so mere loads show up in it only this often.
VIEW_REUSE_S = 0.05
VIEW_REUSE_MEMBERS = 128


class Gossip:
    """The state of one node in the mesh.

    address: where peers reach it, an IP address. boot_id: random, new with each process. now: seconds on a monotonic
    clock, here and in every method the same. Methods that take `now` may be called in any order, `now` never falling."""

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
    ) -> None:
        wire.text(node_id, wire.NODE_ID_BYTES_MAX)
        wire.pack_address(address)
        self.node_id = node_id
        self._config = config
        self._rng = rng
        self._own = own_member(node_id, generation, address, now)
        self._table = MemberTable(self._own)
        self._detector = FailureDetector(config, self._table, rng, now)
        self._cycle = PeerCycle(self._table, rng)
        self._rumours = Rumours(config.retransmit_max)
        self._budget = PacketBudget(config.packet_rate, config.packet_burst, now)
        self._seeds = Seeds(config, seeds, address)
        self._sealer = DatagramSealer(keyring, boot_id)
        self._effects: list[Effect] = []

        self._published_load = NodeLoad()
        self._next_hot = encode_load(NodeLoad())
        self._is_urgent = False  # the next publication is news
        self._publish_at = now
        self._round_at = now + rng.random() * config.round_interval_s
        self._urgent_at = float("inf")
        self._urgent_told_at = float("-inf")
        self._digest_at = now + rng.random() * config.digest_interval_s
        self._digest_low = 0
        self._digest_peer = ""
        self._haste_at = float("inf")
        self._dead_at = float("inf")
        self._dead_order: list[str] = []
        self._died_at = float("-inf")
        self._forget_at = now + config.tombstone_s
        self._has_ticked = False
        self._seen_at = now
        self._has_left = False
        self._rival = (0, 0, now)  # the greatest foreign claim to this node's id, and since when
        self._duplicate_told: dict[str, float] = {}

        self._view: ClusterView | None = None
        self._view_is_wrong = False
        self._view_is_old = False
        self._sent: Counter[str] = Counter()
        self._received: Counter[str] = Counter()
        self._rejects: Counter[str] = Counter()
        self._withheld = self._bytes_sent = self._bytes_received = 0
        self._probes = self._suspicions = self._refutations = self._deaths = self._stalls = self._duplicates = 0
        self.set_profile(NodeProfile(), now)

    # --- time ---

    def next_wakeup(self) -> float:
        """When tick() is due, on the clock of `now`; infinite after leave()."""
        if self._has_left:
            return float("inf")
        return min(
            self._publish_at,
            self._round_at if len(self._table.live) > self._config.direct_peers else float("inf"),
            self._urgent_at,
            self._digest_at,
            self._dead_at,
            self._forget_at,
            self._seeds.next_wakeup(self._table),
            self._haste_at,
            self._detector.next_wakeup(),
        )

    def tick(self, now: float) -> list[Effect]:
        """Everything that is due. Late calls are fine; one later than stall_s counts as a stall of this process."""
        if self._has_left:
            return self._performed()
        self._forgive_stall(now)
        self._has_ticked = True
        if now >= self._publish_at:
            self._publish(now)
        self._probe(now)
        for member in self._detector.due_deaths(now):
            self._deaths += 1
            self._accuse(member, MemberStatus.DEAD, now)
        for seed in self._seeds.due(self._table, now):
            self._call_seed(seed, now)
        if now >= self._dead_at:
            self._call_dead(now)
        if now >= self._digest_at:
            self._send_digest(now)
        if now >= self._urgent_at:
            self._tell_urgently(now)
        if now >= self._round_at:
            self._tell_round(now)
        if now >= self._forget_at:
            self._forget_at = now + self._config.tombstone_s / 100
            self._view_is_wrong |= self._table.forget(now - self._config.tombstone_s)
        return self._performed()

    def _forgive_stall(self, now: float) -> None:
        late_s = now - max(self.next_wakeup(), self._seen_at)
        self._seen_at = now
        if not self._has_ticked or late_s <= self._config.stall_s:
            return
        self._stalls += 1
        self._table.postpone(late_s)
        self._detector.forgive()
        # The others have not heard of this node either: say at once that it lives.
        self._publish_at = now
        self._is_urgent = True
        self._view_is_wrong = True

    def _performed(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    # --- what this node says of itself ---

    def set_load(self, load: NodeLoad, now: float) -> None:
        """What to publish from now on. A jump goes out with the next tick, which is due at once then.

        Raises ValueError for a load that no datagram holds; the former one stays."""
        self._next_hot = encode_load(load)
        self._own.load = load
        self._view_is_wrong = True
        if is_urgent(self._published_load, load) and not self._is_urgent:
            self._is_urgent = True
            self._publish_at = min(self._publish_at, max(now, self._urgent_told_at + self._config.urgent_spacing_s))

    def set_profile(self, profile: NodeProfile, now: float) -> None:
        """Publish another profile with the next tick, which is due at once then.

        Raises ValueError for a profile that no datagram holds; the former one stays."""
        encoded = encode_profile(profile)
        if encoded == self._own.warm:
            return
        self._own.profile, self._own.warm = profile, encoded
        # The version it is published under, raised here so that no datagram in between can name the former.
        self._own.version += 1
        self._own.warm_version = self._own.profile_version = self._own.version
        self._own.touched()
        self._rumours.add_urgent(self.node_id, with_warm=True)
        self._is_urgent = True
        self._publish_at = now
        self._view_is_wrong = True

    def leave(self, now: float) -> list[Effect]:
        """Say farewell. After it nothing is received, sent or due."""
        if self._has_left:
            return []
        self._own.version += 1
        self._own.status = MemberStatus.LEFT
        self._own.touched()
        peers = self._rng.sample(self._table.live, min(len(self._table.live), LEAVE_PEERS_MAX))
        for _ in range(2 if len(peers) <= LEAVE_COPIES_PEERS else 1):
            for peer in peers:
                self._send(peer.address, wire.Leave(), now, to=peer, is_unlimited=True)
        self._has_left = True
        self._view_is_wrong = True
        return self._performed()

    def _publish(self, now: float) -> None:
        own = self._own
        own.version += 1
        own.hot, own.load_version = self._next_hot, own.version
        own.touched()
        self._published_load = own.load
        self._publish_at = now + self._config.publish_interval_s
        self._view_is_old = True
        if len(self._table.live) <= self._config.direct_peers:
            self._tell(self._table.live, now)
        elif self._is_urgent:
            self._urgent_at = min(self._urgent_at, now)
        if self._is_urgent:
            self._urgent_told_at = now
        self._is_urgent = False

    def _renew(self, generation: int, version: int, now: float) -> None:
        """Publish something newer than a claim about this node."""
        own = self._own
        if generation > own.generation:
            own.generation = generation
            self._rumours.add_urgent(self.node_id, with_warm=True)
        own.version = max(own.version, version) + 1
        own.touched()
        self._refutations += 1
        self._is_urgent = True
        self._publish_at = now
        self._view_is_wrong = True

    # --- receiving ---

    def receive(self, datagram: bytes, source: Address, now: float) -> list[Effect]:
        """Take in one datagram, whatever its bytes. One that is rejected changes nothing but its count."""
        if self._has_left:
            return self._performed()
        try:
            if len(datagram) > wire.DATAGRAM_BYTES_MAX:
                raise SealRejected("oversized")
            boot_id, _, payload = self._sealer.open(datagram)
            packet = wire.decode(payload)
            message = packet.message
            if isinstance(message, wire.Join) and not (
                message.protocol_min <= wire.PROTOCOL_MAX and message.protocol_max >= wire.PROTOCOL_MIN
            ):
                raise SealRejected("protocol version")
            plans = [self._table.plan(record) for record in packet.records if record.node_id != self.node_id]
        except SealRejected as exc:
            self._rejects[exc.reason] += 1
            return []
        except MalformedDatagram:
            self._rejects["malformed"] += 1
            return []
        self._forgive_stall(now)
        self._received[wire.MESSAGE_LABELS[type(message)]] += 1
        self._bytes_received += len(datagram)
        if packet.sender == self.node_id:
            # A former process of this very node speaks from the same address; anything else is a second one.
            if source != self._own.address:
                self._report_duplicate(self.node_id, source, now)
            return self._performed()
        if self._is_second_process(packet, boot_id, source, now):
            self._report_duplicate(packet.sender, source, now)
            plans = []
            if not isinstance(message, wire.Join):
                return self._performed()
        for plan in plans:
            if plan is not None:
                self._merge(plan, packet.sender, now)
        for record in packet.records:
            if record.node_id == self.node_id:
                self._hear_about_self(record, source, now)
        self._answer(packet, source, now)
        return self._performed()

    def _merge(self, plan: Plan, told_by: str, now: float) -> None:
        node_id, change = plan.record.node_id, plan.change
        before = None
        known = self._table.members.get(node_id)
        is_news = bool(change & NEWS)
        if known is not None and is_news:
            before = known.view(now, is_self=False)
        # One datagram may hold two records of one member: the second is compared anew.
        again = self._table.plan(plan.record)
        if again is None:
            return
        member = self._table.apply(again, now, told_by=told_by)
        if member is None:
            return
        self._noticed(member, again.change, before, now)
        if member.is_live and member.warm_version > member.profile_version:
            # Its profile is missing: compare with itself soon, beginning at it.
            self._digest_peer, self._digest_low = node_id, member.id_hash
            self._digest_at = min(self._digest_at, now + self._config.digest_hurry_s)

    def _noticed(self, member: Member, change: Change, before: MemberView | None, now: float) -> None:
        """Pass on, watch and report what changed in a row."""
        if change & NEWS or change & Change.ACCUSED:
            with_warm = bool(change & (Change.NEW | Change.GENERATION | Change.PROFILE))
            self._rumours.add_urgent(member.node_id, with_warm=with_warm)
            self._urgent_at = min(self._urgent_at, max(now, self._urgent_told_at + self._config.urgent_spacing_s))
            self._view_is_wrong = True
        elif change & (Change.ADVANCED | Change.LOAD):
            self._rumours.add_load(member.node_id)
            self._view_is_old = True
        if member.status is MemberStatus.SUSPECT and change & (Change.STATUS | Change.ACCUSED | Change.ADVANCED):
            self._detector.watch(member)
        if not member.is_live and change & (Change.STATUS | Change.NEW):
            self._died_at = now
            self._dead_at = min(self._dead_at, now + self._config.dead_recent_interval_s)
        if change & NEWS:
            self._effects.append(MemberChanged(before, member.view(now, is_self=False)))

    def _accuse(self, member: Member, status: MemberStatus, now: float) -> None:
        """This node's own verdict on a member: SUSPECT or DEAD at the version it knows."""
        accusers = self._detector.accuse(member) if status is MemberStatus.SUSPECT else ()
        record = wire.Record(
            member.node_id,
            member.generation,
            member.version,
            status,
            member.address,
            member.warm_version,
            accusers=join_accusers(accusers, ()),
        )
        plan = self._table.plan(record)
        if plan is not None:
            self._merge(plan, "", now)

    def _hear_about_self(self, record: wire.Record, source: Address, now: float) -> None:
        own = self._own
        claimed = (record.generation, record.version)
        if claimed <= (own.generation, own.version):
            if record.generation < own.generation or record.status is MemberStatus.ALIVE:
                return
            if record.version == own.version:
                self._detector.adjust_awareness(1)  # Lifeguard: to be suspected speaks against oneself
                self._renew(own.generation, own.version, now)
            # The newer version may be on its way already; who has not heard it is told directly.
            self._send(source, wire.Rumour(), now)
            return
        if claimed > self._rival[:2]:
            self._rival = (*claimed, now)
        is_gone = record.status in (MemberStatus.DEAD, MemberStatus.LEFT)
        if is_gone or record.address == own.address or now - self._rival[2] > RIVAL_SILENT_S:
            # A former life of this node whose generation was lost with its data.
            self._renew(record.generation + 1, 0, now)
        else:
            self._report_duplicate(self.node_id, record.address, now)

    def _is_second_process(self, packet: wire.Packet, boot_id: bytes, source: Address, now: float) -> bool:
        """True where another process than the one known speaks for a member that is alive elsewhere."""
        member = self._table.members.get(packet.sender)
        claims = [r.generation for r in packet.records if r.node_id == packet.sender]
        if member is None or not claims or claims[0] > member.generation:
            return False
        if member.boot_id == boot_id:
            return False
        if not member.boot_id and claims[0] == member.generation:
            member.boot_id = boot_id
            return False
        is_alive_elsewhere = member.is_live and source != member.address and now - member.advanced_at <= RIVAL_SILENT_S
        if not is_alive_elsewhere and claims[0] == member.generation:
            member.boot_id = boot_id
        return is_alive_elsewhere

    def _report_duplicate(self, node_id: str, address: Address, now: float) -> None:
        self._duplicates += 1
        if now - self._duplicate_told.get(node_id, float("-inf")) < DUPLICATE_INTERVAL_S:
            return
        if len(self._duplicate_told) >= DUPLICATES_MAX:
            self._duplicate_told.clear()
        self._duplicate_told[node_id] = now
        self._effects.append(DuplicateNode(node_id, address))

    def _answer(self, packet: wire.Packet, source: Address, now: float) -> None:
        message = packet.message
        sender = self._table.members.get(packet.sender)
        match message:
            case wire.Ping(sequence, target):
                if target == self.node_id:
                    self._send(source, wire.Ack(sequence, target), now, to=sender)
            case wire.Ack(sequence, target):
                relay = self._detector.relay_answered(sequence, target)
                if relay is None:
                    self._detector.answered(sequence, target)
                    return
                member = self._table.members.get(target)
                records = [] if member is None else [member.encoded(with_warm=False)]
                self._send(relay.origin, wire.Ack(relay.origin_sequence, target), now, records=records)
            case wire.PingRequest(sequence, target, address):
                relayed = self._detector.relay(source, sequence, target, now)
                self._send(address, wire.Ping(relayed, target), now, to=self._table.members.get(target))
            case wire.Nack(sequence):
                self._detector.nacked(sequence)
            case wire.Digest():
                difference = compare(self._table, message, packet.sender, self._config.digest_lag_versions)
                self._send_delta(source, difference.lacking, now)
                if difference.wanted and not message.is_reply:
                    self._send(source, wire.Digest(1, 0, difference.wanted, is_reply=True), now, is_filled=False)
            case wire.Delta(join_sequence):
                self._send_delta(source, self._overruled(packet.records), now)
                if self._seeds.answered(join_sequence, packet.sender):
                    self._send_digest_to(source, now)
            case wire.Join(sequence):
                members = [(m, True) for m in self._table.sample(self._rng, len(self._table.live))]
                known_better = [(sender, False)] if sender is not None and self._knows_better(packet, sender) else []
                self._send_delta(source, known_better + members, now, join_sequence=sequence)
            case wire.Rumour() | wire.Leave():
                pass
            case _:
                assert_never(message)

    def _knows_better(self, packet: wire.Packet, sender: Member) -> bool:
        """True where a joining node claims less than is known of it, so that it must learn of its former life."""
        claims = [(r.generation, r.version, r.status) for r in packet.records if r.node_id == sender.node_id]
        return bool(claims) and claims[0] < (sender.generation, sender.version, sender.status)

    def _overruled(self, records: Iterable[wire.Record]) -> list[tuple[Member, bool]]:
        """Members that the sender of a Delta holds for alive and that are known here to be gone."""
        known = [(record, self._table.members.get(record.node_id)) for record in records]
        return [(m, False) for r, m in known if m is not None and not m.is_live and r.status < m.status]

    # --- evidence from the peer links ---

    def link_answered(self, node_id: str, now: float) -> None:
        """The member answered over its link, so no probe under way may accuse it."""
        self._detector.answered_otherwise(node_id)

    def link_failed(self, node_id: str, now: float) -> None:
        """The link to the member broke or did not answer: probe it with the next tick, which is due at once then."""
        member = self._table.members.get(node_id)
        if member is not None and member.is_live and member is not self._own:
            if self._detector.hasten(node_id):
                self._haste_at = min(self._haste_at, now)

    def observe_load(self, node_id: str, load: NodeLoad, now: float) -> None:
        """A fresher load that rode on a link frame; the next newer publication replaces it."""
        member = self._table.members.get(node_id)
        if member is not None and member.is_live and member is not self._own:
            member.load, member.load_at = load, now
            self._view_is_old = True

    # --- what is due ---

    def _probe(self, now: float) -> None:
        for probe in self._detector.due_indirect(now):
            member = self._table.members.get(probe.node_id)
            if member is None:
                continue
            for helper in self._table.sample(self._rng, self._config.indirect_count, without=probe.node_id):
                request = wire.PingRequest(probe.sequence, probe.node_id, member.address)
                probe.asked_count += self._send(helper.address, request, now, to=helper)
            self._effects.append(PingLink(member.node_id, member.address))
        for member in self._detector.due_verdicts(now):
            self._suspicions += 1
            self._accuse(member, MemberStatus.SUSPECT, now)
        for relay in self._detector.due_nacks(now):
            self._send(relay.origin, wire.Nack(relay.origin_sequence), now)
        self._haste_at = float("inf")
        for probe in self._detector.begin(now):
            self._probes += 1
            member = self._table.members[probe.node_id]
            self._send(member.address, wire.Ping(probe.sequence, probe.node_id), now, to=member)

    def _call_seed(self, seed: Seed, now: float) -> None:
        if seed.join_sequence:
            seed.unanswered += 1
            if seed.unanswered & (seed.unanswered - 1) == 0:
                self._effects.append(SeedUnanswered(seed.address, seed.unanswered))
        seed.join_sequence = self._detector.next_sequence()
        self._send_join(seed.address, seed.join_sequence, now, None)

    def _call_dead(self, now: float) -> None:
        """Call one of the dead: it may be back, or the network that parted it from here."""
        if not self._dead_order:
            members = self._table.members
            self._dead_order = [i for i in self._table.tombstones if members[i].status is MemberStatus.DEAD]
            if not self._dead_order:
                self._dead_at = float("inf")
                return
        is_recent = now - self._died_at < self._config.recent_death_s
        interval_s = self._config.dead_recent_interval_s if is_recent else self._config.dead_interval_s
        self._dead_at = now + max(self._config.dead_spacing_s, interval_s / len(self._table.tombstones or "1"))
        member = self._table.members.get(self._dead_order.pop())
        if member is not None and member.status is MemberStatus.DEAD:
            self._send_join(member.address, self._detector.next_sequence(), now, member)

    def _send_join(self, address: Address, sequence: int, now: float, to: Member | None) -> None:
        records = [self._own.encoded(with_warm=True)]
        self._send(address, wire.Join(sequence), now, to=to, records=records, is_filled=False)

    def _send_digest(self, now: float) -> None:
        self._digest_at = now + self._config.digest_interval_s
        peer = self._table.members.get(self._digest_peer)
        self._digest_peer = ""
        if peer is None or not peer.is_live:
            if not self._table.live:
                return
            peer = self._rng.choice(self._table.live)
        self._send_digest_to(peer.address, now)

    def _send_digest_to(self, address: Address, now: float) -> None:
        digest, self._digest_low = build_digest(self._table, self._digest_low)
        self._send(address, digest, now, is_filled=False)

    def _send_delta(
        self, address: Address, members: list[tuple[Member, bool]], now: float, *, join_sequence: int | None = None
    ) -> None:
        """Records in as many packets as needed, at most DELTA_PACKETS_MAX; an answer to a Join goes out even if empty."""
        records = [m.encoded(with_warm=with_warm) for m, with_warm in members if m is not self._own]
        own_record = self._own.encoded(with_warm=True)
        message = wire.Delta(join_sequence or 0)
        if any(m is self._own for m, _ in members) or join_sequence is not None:
            records.insert(0, own_record)
        for _ in range(DELTA_PACKETS_MAX):
            if not records:
                return
            room_bytes = wire.PAYLOAD_BYTES_MAX - len(wire.encode_head(self.node_id, message)) - len(own_record)
            batch: list[bytes] = []
            while records and (not batch or len(records[0]) <= room_bytes):
                room_bytes -= len(records[0])
                batch.append(records.pop(0))
            self._send(address, message, now, records=batch, is_filled=False, reserve=self._config.packet_reserve)

    def _tell_urgently(self, now: float) -> None:
        self._urgent_at = float("inf")
        self._urgent_told_at = now
        if len(self._table.live) <= self._config.direct_peers:
            self._tell(self._table.live, now)
        else:
            self._tell(self._cycle.take(self._config.urgent_peers), now)

    def _tell_round(self, now: float) -> None:
        self._round_at = now + self._config.round_interval_s
        live_count = len(self._table.live)
        if live_count > self._config.direct_peers:
            # Each peer directly once a publication, as far as round_peers allows.
            wanted = math.ceil(live_count * self._config.round_interval_s / self._config.publish_interval_s)
            self._tell(self._cycle.take(min(wanted, self._config.round_peers)), now)

    def _tell(self, peers: Iterable[Member], now: float) -> None:
        for peer in peers:
            self._send(peer.address, wire.Rumour(), now, to=peer, reserve=self._config.packet_reserve)

    def _send(
        self,
        address: Address,
        message: wire.Message,
        now: float,
        *,
        to: Member | None = None,
        records: Iterable[bytes] = (),
        is_filled: bool = True,
        reserve: int = 0,
        is_unlimited: bool = False,
    ) -> bool:
        """Seal one packet: the message, what must go with it, the own record, and news as far as there is room.

        False where the packet budget withholds it."""
        if not is_unlimited and not self._budget.take(now, reserve=reserve):
            self._withheld += 1
            return False
        parts = [wire.encode_head(self.node_id, message), *records]
        size = sum(map(len, parts))
        must = [self._rumours.take_own(self._own) if is_filled else self._own.encoded(with_warm=False)]
        if to is not None and to.status is not MemberStatus.ALIVE:
            must.append(to.encoded(with_warm=False))  # Lifeguard's buddy system: who is suspected hears it first
        for part in must:
            if size + len(part) <= wire.PAYLOAD_BYTES_MAX and part not in parts:
                parts.append(part)
                size += len(part)
        if is_filled:
            parts += self._rumours.take(self._table, wire.PAYLOAD_BYTES_MAX - size, to.node_id if to else "")
        datagram = self._sealer.seal(b"".join(parts))
        self._sent[wire.MESSAGE_LABELS[type(message)]] += 1
        self._bytes_sent += len(datagram)
        self._effects.append(SendDatagram(address, datagram))
        return True

    # --- what others read ---

    def view(self, now: float) -> ClusterView:
        """The members as of now. The same object as before where nothing changed and no time passed to speak of."""
        former = self._view
        if former is not None and not self._view_is_wrong:
            is_large = len(former.members) > VIEW_REUSE_MEMBERS
            if now == former.now and not self._view_is_old:
                return former
            if now - former.now < VIEW_REUSE_S and (is_large or not self._view_is_old):
                return former
        members = {i: m.view(now, is_self=m is self._own) for i, m in self._table.members.items()}
        self._view = ClusterView(
            self_id=self.node_id,
            now=now,
            members=MappingProxyType(members),
            awareness=self._detector.awareness,
            publish_interval_s=self._config.publish_interval_s,
        )
        self._view_is_wrong = self._view_is_old = False
        return self._view

    def statistics(self) -> GossipStatistics:
        """Counts as of now, independent of later ones."""
        return GossipStatistics(
            packets_sent=MappingProxyType(dict(self._sent)),
            packets_received=MappingProxyType(dict(self._received)),
            packets_withheld=self._withheld,
            bytes_sent=self._bytes_sent,
            bytes_received=self._bytes_received,
            rejects=MappingProxyType(dict(self._rejects)),
            probes=self._probes,
            suspicions=self._suspicions,
            refutations=self._refutations,
            deaths=self._deaths,
            stalls=self._stalls,
            duplicates=self._duplicates,
            members_refused=self._table.refused,
            awareness=self._detector.awareness,
            members=len(self._table.members),
            rumours_waiting=self._rumours.waiting_count,
            suspicions_watched=self._detector.watched_count,
        )
