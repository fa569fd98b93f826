"""Who speaks under which id: former lives of this node, and second processes under one name."""

from __future__ import annotations

from enum import Enum, auto

from mesh.gossip_types import DuplicateNode
from mesh.member import Member
from mesh.membership import MemberTable
from mesh.packets import Packet, Record
from mesh.view import Address, MemberStatus

DUPLICATE_INTERVAL_S = 10.0  # between two reports of one duplicate id
DUPLICATES_MAX = 64  # ids whose last report is remembered; beyond it some are reported again too soon
# A claim that nobody raises for this long is of a process that is gone: several publications.
SILENT_S = 5.0
# How long a process must be refused under its name until it gives up: beyond SILENT_S, so that one that was restarted
# at another address outlasts what is remembered of its former life.
FENCED_S = 8.0


class Claim(Enum):
    """What a record about this very node means to it."""

    KNOWN = auto()  # nothing it did not say itself
    ACCUSES = auto()  # it is taken for suspect, dead or gone at the version it has now
    BEHIND = auto()  # the same of a former version: the sender has not heard the newer one
    FORMER_LIFE = auto()  # something greater that no living process claims: an own generation lost with its data
    RIVAL = auto()  # something greater that a living process elsewhere claims


class Identity:
    """Compares what comes in with who this node is, and with the process known to speak for each member.

    count: datagrams and claims of second processes."""

    def __init__(self, table: MemberTable, now: float) -> None:
        self.count = 0
        self._table = table
        self._own = table.own
        self._rival = (0, 0)
        self._rival_since = now
        self._started_at = now
        self._refused_since = float("inf")
        self._refused_at = float("-inf")
        self._told_at: dict[str, float] = {}

    def judge(self, record: Record, now: float) -> Claim:
        """A record about this node, as others tell it."""
        own = self._own
        claimed = (record.generation, record.version)
        if claimed <= (own.generation, own.version):
            if record.generation < own.generation or record.status is MemberStatus.ALIVE:
                return Claim.KNOWN
            return Claim.ACCUSES if record.version == own.version else Claim.BEHIND
        if claimed > self._rival:
            self._rival, self._rival_since = claimed, now
        is_gone = record.status in (MemberStatus.DEAD, MemberStatus.LEFT)
        # No two processes hold one address, so a claim for this one is of a process that is no more.
        if is_gone or record.address == own.address or now - self._rival_since > SILENT_S:
            return Claim.FORMER_LIFE
        return Claim.RIVAL

    def is_second_process(self, packet: Packet, boot_id: bytes, source: Address, now: float) -> bool:
        """True where another process than the one known speaks for a member that is alive and heard elsewhere.

        Otherwise the sender is the one known from now on, if it claims the generation known."""
        member = self._table.members.get(packet.sender)
        generation = next((r.generation for r in packet.records if r.node_id == packet.sender), None)
        if member is None or generation is None or member.boot_id == boot_id:
            return False
        is_elsewhere = source != member.address and self._is_heard(member, now)
        if is_elsewhere and (member.boot_id or generation != member.generation):
            return True
        if generation == member.generation:
            member.boot_id = boot_id
        return False

    def is_held_back(self, record: Record, now: float) -> bool:
        """True for a later life at another address, told by others, of a member that is heard where it was."""
        member = self._table.members.get(record.node_id)
        return (
            member is not None
            and record.generation > member.generation
            and record.address != member.address
            and self._is_heard(member, now)
        )

    def _is_heard(self, member: Member, now: float) -> bool:
        return member.is_live and now - member.advanced_at <= SILENT_S

    def refused(self, known_ms: int, answered_at: float, now: float) -> bool:
        """A peer hears another process under this node's name, and has for so long. answered_at: when anybody last
        answered this process.

        True once that has gone on long enough for this process to give up. The older of the two goes on while anybody
        takes it for the one, as after a partition in which each side has its own; not once nobody does, as when it
        stood still so long that the other took its place."""
        is_older = known_ms / 1000 <= now - self._started_at
        if is_older and now - answered_at < FENCED_S:
            return False
        if now - self._refused_at > SILENT_S:
            self._refused_since = now
        self._refused_at = now
        return now - self._refused_since >= FENCED_S

    def report(self, node_id: str, address: Address, now: float) -> DuplicateNode | None:
        """Count a second process; what to tell of it, unless that was told a short while ago."""
        self.count += 1
        if now - self._told_at.get(node_id, float("-inf")) < DUPLICATE_INTERVAL_S:
            return None
        if len(self._told_at) >= DUPLICATES_MAX:
            self._told_at.clear()
        self._told_at[node_id] = now
        return DuplicateNode(node_id, address)
