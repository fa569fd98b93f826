"""What each message asks of this node, and its reply. Records were merged before; nothing here changes a member."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import assert_never

from mesh import packets
from mesh.anti_entropy import DigestTurns, Lacking, compare
from mesh.contacts import Contacts
from mesh.failure_detector import FailureDetector
from mesh.gossip_types import GossipConfig
from mesh.member import Member
from mesh.membership import MemberTable
from mesh.outbox import Outbox
from mesh.view import Address, MemberStatus

JOIN_SAMPLE = 12  # members named to a joining node, more than its answer has room for; an exchange brings the rest


class Answers:
    """Replies over the parts of one Gossip."""

    def __init__(
        self,
        config: GossipConfig,
        table: MemberTable,
        detector: FailureDetector,
        contacts: Contacts,
        digests: DigestTurns,
        outbox: Outbox,
        rng: random.Random,
    ) -> None:
        self._config = config
        self._table = table
        self._detector = detector
        self._contacts = contacts
        self._digests = digests
        self._outbox = outbox
        self._rng = rng

    def answer(self, packet: packets.Packet, source: Address, now: float) -> bool:
        """Replies go to `source`, where the datagram came from, whatever address its sender advertises.

        True where the sender answered the call of a seed, and so knows a mesh that this node does not."""
        message, outbox, members = packet.message, self._outbox, self._table.members
        sender = members.get(packet.sender)
        if outlived := self._outlived(packet.records):
            outbox.send_delta(source, outlived, now)
        match message:
            case packets.Ping(sequence, target):
                # A ping for another was meant for who had this address before.
                if target == self._table.own.node_id:
                    outbox.send(source, packets.Ack(sequence, target), now, to=sender)
            case packets.Ack(sequence, target, cookie):
                if cookie:
                    outbox.echo_cookie(source, cookie, 0, now)
                relay = self._detector.relay_answered(sequence, target)
                if relay is None:
                    self._detector.answered(sequence, target, now)
                else:
                    records = [members[target].encoded(with_warm=False)] if target in members else []
                    outbox.send(relay.origin, packets.Ack(relay.origin_sequence, target), now, records=records)
            case packets.PingRequest(sequence, target, address):
                relayed = self._detector.relay(source, sequence, target, now)
                outbox.send(address, packets.Ping(relayed, target), now, to=members.get(target))
            case packets.Nack(sequence):
                self._detector.nacked(sequence)
            case packets.Digest():
                difference = compare(self._table, message, packet.sender, self._config.digest_lag_versions)
                outbox.send_delta(source, difference.lacking, now)
                if difference.wanted and not message.is_reply:
                    outbox.send(source, packets.Digest(1, 0, difference.wanted, is_reply=True), now, is_filled=False)
            case packets.Delta(join_sequence):
                outbox.send_delta(source, self._overruled(packet.records), now)
                if self._contacts.answered(join_sequence, packet.sender):
                    outbox.send(source, self._digests.build(), now, is_filled=False)
                    return True
            case packets.Join(sequence):
                self._answer_join(packet, sender, source, sequence, now)
            case packets.CookieEcho(_, join_sequence):
                if join_sequence:
                    self._answer_join(packet, sender, source, join_sequence, now)
            case packets.Cookie(cookie):
                outbox.echo_cookie(source, cookie, self._contacts.call_to(source), now)
            case packets.Rumour() | packets.Leave() | packets.Conflict() | packets.Unknown():
                pass
            case _:
                assert_never(message)
        return False

    def answer_second_process(self, packet: packets.Packet, known: Member, source: Address, now: float) -> None:
        """Tell the sender of a packet that its name is taken, by whom and since when. known: whom this node knows."""
        match packet.message:
            case packets.Join(sequence) | packets.CookieEcho(join_sequence=sequence):
                pass
            case _:
                sequence = 0
        known_ms = int(1000 * (now - known.known_since))
        self._outbox.send_bare(source, packets.Conflict(known_ms, known.address, sequence), now)

    def answer_stranger(self, packet: packets.Packet, cookie: int, source: Address, now: float) -> None:
        """A cookie for a process that is not admitted. Its ping is answered as well: that tells nothing and takes
        nothing. A cookie of its own comes back, with news only if this node has called it."""
        match packet.message:
            case packets.Cookie(theirs):
                sequence = self._contacts.call_to(source)
                if sequence:
                    self._outbox.echo_cookie(source, theirs, sequence, now)
                else:
                    self._outbox.send_bare(source, packets.CookieEcho(theirs), now)
            case packets.Ping(sequence, target) if target == self._table.own.node_id:
                self._outbox.send_bare(source, packets.Ack(sequence, target, cookie), now)
            case packets.CookieEcho():
                pass  # not this cookie: to answer with another could go on without an end
            case _:
                self._outbox.send_bare(source, packets.Cookie(cookie), now)

    def _answer_join(
        self, packet: packets.Packet, sender: Member | None, source: Address, sequence: int, now: float
    ) -> None:
        named = [Lacking(m, with_bulk=False) for m in self._table.sample(self._rng, JOIN_SAMPLE, packet.sender)]
        if sender is not None and _knows_better(packet.records, sender):
            named.insert(0, Lacking(sender, with_warm=False, with_bulk=False))
        self._outbox.answer_join(source, sequence, named, now)

    def _outlived(self, records: Iterable[packets.Record]) -> list[Lacking]:
        """Members that the sender doubts at a version that a newer one known here refutes. In a large mesh it may not
        hear of that by itself before it takes them for dead."""
        doubted = [r for r in records if r.status in (MemberStatus.SUSPECT, MemberStatus.DEAD)]
        known = [(r, self._table.members.get(r.node_id)) for r in doubted if r.node_id != self._table.own.node_id]
        return [
            Lacking(m, with_warm=False, with_bulk=False)
            for r, m in known
            if m is not None
            and m.status is MemberStatus.ALIVE
            and (m.generation, m.version) > (r.generation, r.version)
        ]

    def _overruled(self, records: Iterable[packets.Record]) -> list[Lacking]:
        """Members that the sender of a Delta holds for alive and that are known here to be gone."""
        known = [(record, self._table.members.get(record.node_id)) for record in records]
        return [
            Lacking(m, with_warm=False, with_bulk=False)
            for r, m in known
            if m is not None and not m.is_live and r.status < m.status
        ]


def _knows_better(records: Iterable[packets.Record], sender: Member) -> bool:
    """True where a joining node claims less than is known of it, so that it must learn of its former life."""
    claims = [(r.generation, r.version, r.status) for r in records if r.node_id == sender.node_id]
    return bool(claims) and claims[0] < (sender.generation, sender.version, sender.status)
