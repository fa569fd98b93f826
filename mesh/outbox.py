"""What a node sends: packets sealed and filled with news within their size, the packet budget, and the counts of both.

Every packet carries the own record, so each is a sign of life."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from mesh import packets, wire
from mesh.anti_entropy import Lacking
from mesh.dissemination import PacketBudget, Rumours
from mesh.gossip_types import Effect, GossipConfig, SendDatagram
from mesh.member import Member
from mesh.membership import MemberTable
from mesh.seal import DatagramSealer
from mesh.signs import HEADER_BYTES, with_signs
from mesh.view import Address, MemberStatus

DELTA_PACKETS_MAX = 4  # in one answer; what does not fit is found by the next digest, with another peer


class Outbox:
    """Effects in the order they are to be performed, drained at the end of each call into the core."""

    def __init__(self, config: GossipConfig, table: MemberTable, sealer: DatagramSealer, now: float) -> None:
        self.rumours = Rumours(table, config.retransmit_max)
        self.sent: Counter[str] = Counter()
        self.bytes_sent = 0
        self.withheld = 0
        self.unlimited = 0  # sent outside the budget
        self._reserve = config.packet_reserve
        self._table = table
        self._own = table.own
        self._sealer = sealer
        self._budget = PacketBudget(config.packet_rate, config.packet_burst, config.byte_rate, now)
        self._effects: list[Effect] = []

    def emit(self, effect: Effect) -> None:
        self._effects.append(effect)

    def drain(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    def send(
        self,
        address: Address,
        message: packets.Message,
        now: float,
        *,
        to: Member | None = None,
        records: Iterable[bytes] = (),
        is_filled: bool = True,
        reserve: int = 0,
        is_unlimited: bool = False,
    ) -> bool:
        """One packet: the message, the records that must go with it, the own one, and news as far as there is room.

        False where the packet budget, less `reserve`, withholds it."""
        self.unlimited += is_unlimited
        if not is_unlimited and not self._budget.take(now, reserve=reserve):
            self.withheld += 1
            return False
        head = wire.encode_head(self._own.node_id, message)
        parts = [*records]
        size = len(head) + sum(map(len, parts))
        must = [self.rumours.take_own() if is_filled else self._own.encoded(with_warm=False)]
        if to is not None and to.status is not MemberStatus.ALIVE:
            must.append(to.encoded(with_warm=False))  # Lifeguard's buddy system: who is suspected hears it first
        for part in must:
            if size + len(part) <= wire.PAYLOAD_BYTES_MAX and part not in parts:
                parts.append(part)
                size += len(part)
        if is_filled:
            room_bytes = wire.PAYLOAD_BYTES_MAX - size - HEADER_BYTES
            own_sign = self._own.encoded_sign()
            signs = [own_sign] if 0 < len(own_sign) <= room_bytes else []
            taken = self.rumours.take(
                self._budget.room_bytes(room_bytes - sum(map(len, signs))), to.node_id if to else ""
            )
            signs += taken.signs
            parts += taken.records
            if signs:
                head = with_signs(head, signs)
        self._emit_datagram(address, message, b"".join((head, *parts)))
        return True

    def _emit_datagram(self, address: Address, message: packets.Message, payload: bytes) -> None:
        assert len(payload) <= wire.PAYLOAD_BYTES_MAX, f"a payload of {len(payload)} bytes fits no datagram"
        datagram = self._sealer.seal(payload)
        self._budget.spend(len(datagram))
        self.sent[packets.MESSAGE_LABELS[type(message)]] += 1
        self.bytes_sent += len(datagram)
        self._effects.append(SendDatagram(address, datagram))

    def tell(self, peers: Iterable[Member], now: float, *, is_urgent: bool = False) -> list[str]:
        """News to each, as far as the budget allows beyond what is kept for probes, and for what is more urgent.

        Returns the ids of those for whom it did not suffice."""
        reserve = self._reserve if is_urgent else 2 * self._reserve
        return [p.node_id for p in peers if not self.send(p.address, packets.Rumour(), now, to=p, reserve=reserve)]

    def tell_urgently(self, peers: Iterable[Member], now: float) -> bool:
        """True where it helped and urgent news are left: worth telling the next peers soon."""
        before = self.rumours.urgent_tellings
        self.tell(peers, now, is_urgent=True)
        return self.rumours.has_urgent and self.rumours.urgent_tellings > before

    def send_bare(self, address: Address, message: packets.Message, now: float) -> None:
        """A packet without records and, where it is a cookie or its echo, without a name: to one who is not known, and
        no larger than what came from it. The caller keeps to a budget of its own."""
        self.unlimited += 1
        sender = "" if isinstance(message, packets.Cookie | packets.CookieEcho) else self._own.node_id
        self._emit_datagram(address, message, wire.encode_head(sender, message))

    def send_join(self, address: Address, sequence: int, now: float, to: Member | None) -> None:
        records = [self._own.encoded(with_warm=True)]
        self.send(address, packets.Join(sequence), now, to=to, records=records, is_filled=False)

    def echo_cookie(self, address: Address, cookie: int, join_sequence: int, now: float) -> None:
        """To one who is known, or called: with the own record, and its profile where it is a call."""
        records = [self._own.encoded(with_warm=True)] if join_sequence else []
        message = packets.CookieEcho(cookie, join_sequence)
        self.send(address, message, now, records=records, is_filled=not join_sequence, is_unlimited=True)

    def send_delta(self, address: Address, lacking: list[Lacking], now: float) -> None:
        """What the receiver lacks, in as many packets as needed up to the limit."""
        self._send_records(address, packets.Delta(), [entry.encoded() for entry in lacking], now)

    def answer_join(self, address: Address, sequence: int, lacking: list[Lacking], now: float) -> None:
        """One packet, the own record first, so that there is an answer even where no other member is known."""
        records = [self._own.encoded(with_warm=True)]
        records += [entry.encoded() for entry in lacking if entry.member is not self._own]
        self._send_records(address, packets.Delta(sequence), records, now)

    def _send_records(self, address: Address, message: packets.Delta, records: list[bytes], now: float) -> None:
        # Who joins is answered whatever else there is to send: until then it knows nobody.
        is_join = message.join_sequence > 0
        packets_max = 1 if is_join else DELTA_PACKETS_MAX
        reserve = self._reserve
        room_bytes = wire.PAYLOAD_BYTES_MAX - len(wire.encode_head(self._own.node_id, message))
        room_bytes -= len(self._own.encoded(with_warm=False))  # which send() adds
        batches: list[list[bytes]] = []
        left = 0
        for record in records:
            if len(record) > left:
                if len(batches) == packets_max:
                    break
                batches.append([])
                left = room_bytes
            batches[-1].append(record)
            left -= len(record)
        for batch in batches:
            self.send(address, message, now, records=batch, is_filled=False, reserve=reserve, is_unlimited=is_join)
