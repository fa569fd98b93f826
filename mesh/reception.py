"""What is let in: a datagram that is sealed by a key holder, whole, of a process that lives, and within its pace.

Counts what comes and what is turned away; merges nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from mesh import packets, wire
from mesh.admission import Admission
from mesh.answers import Answers
from mesh.contacts import Contacts
from mesh.errors import MalformedDatagram, SealRejected
from mesh.failure_detector import FailureDetector
from mesh.membership import MemberTable, Plan
from mesh.seal import DatagramSealer, Opened
from mesh.view import Address


@dataclass(frozen=True, slots=True)
class Arrival:
    """A datagram let in. plans: what its records about others would change, in their order."""

    boot_id: bytes
    packet: packets.Packet
    plans: list[Plan | None]


class Reception:
    """The door of one Gossip. received: packets let in, by message. rejects: datagrams turned away, by reason.
    strangers: datagrams of processes that had not proven yet that they live."""

    def __init__(
        self,
        sealer: DatagramSealer,
        admission: Admission,
        table: MemberTable,
        detector: FailureDetector,
        contacts: Contacts,
        answers: Answers,
    ) -> None:
        self.received: Counter[str] = Counter()
        self.rejects: Counter[str] = Counter()
        self.bytes_received = self.strangers = 0
        self._sealer = sealer
        self._admission = admission
        self._table = table
        self._detector = detector
        self._contacts = contacts
        self._answers = answers

    def let_in(self, datagram: bytes, source: Address, now: float) -> Arrival | None:
        """None for one that is rejected, which changes nothing but its count, or a stranger's, which is answered."""
        try:
            opened = self._open(datagram)
            if opened.is_admitted and self._admission.is_flooding(opened.boot_id, now):
                raise SealRejected("flood")
            packet = wire.decode(opened.payload)
            if isinstance(packet.message, packets.Join) and not packet.message.is_compatible:
                raise SealRejected("protocol version")
            is_known = opened.is_admitted and self._admission.is_at(opened.boot_id, source)
            if not is_known and not self._is_proven(opened, packet.message, source):
                self._meet_stranger(opened, packet, source, now)
                return None
            own_id = self._table.own.node_id
            plans = [self._table.plan(record) for record in packet.records if record.node_id != own_id]
        except SealRejected as exc:
            self.rejects[exc.reason] += 1
            return None
        except MalformedDatagram:
            self.rejects["malformed"] += 1
            return None
        if not opened.is_admitted:
            self._sealer.admit(opened)
        if not is_known:
            self._admission.note(opened.boot_id, source)
        self.received[packets.MESSAGE_LABELS[type(packet.message)]] += 1
        self.bytes_received += len(datagram)
        return Arrival(opened.boot_id, packet, plans)

    def _open(self, datagram: bytes) -> Opened:
        """Raises SealRejected."""
        if len(datagram) > wire.DATAGRAM_BYTES_MAX:
            raise SealRejected("oversized")
        return self._sealer.open(datagram)

    def vouch(self, boot_id: bytes, address: Address) -> None:
        """An admitted peer says that this process lives at that address."""
        self._sealer.admit_process(boot_id)
        self._admission.note(boot_id, address)

    def _is_proven(self, opened: Opened, message: packets.Message, source: Address) -> bool:
        """True where a datagram holds what only a process that is alive now can know: an answer to a question of this
        node."""
        match message:
            case packets.CookieEcho(cookie):
                return cookie == self._admission.cookie(opened.boot_id, source)
            case packets.Ack(sequence, target):
                return self._detector.is_asked(sequence, target)
            case packets.Delta(join_sequence) | packets.Conflict(join_sequence=join_sequence):
                return self._contacts.is_called(join_sequence)
            case _:
                return False

    def _meet_stranger(self, opened: Opened, packet: packets.Packet, source: Address, now: float) -> None:
        self.strangers += 1
        if self._admission.may_send_cookie(now):
            self._answers.answer_stranger(packet, self._admission.cookie(opened.boot_id, source), source, now)
