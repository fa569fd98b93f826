"""Where the simulator looks into a core: rows of its table and sizes of its queues, without the cost of a view."""

from __future__ import annotations

from dataclasses import dataclass

from mesh.anti_entropy import LACKING_MAX
from mesh.failure_detector import HASTY_MAX, PROBES_MAX, RELAYS_MAX
from mesh.gossip import Gossip
from mesh.identity import DUPLICATES_MAX
from mesh.member import Member
from mesh.membership import MEMBERS_MAX, TOMBSTONES_MAX, MemberTable
from mesh.packets import Record
from mesh.seal import BOOTS_MAX
from mesh.view import Address


@dataclass(frozen=True, slots=True)
class TableSize:
    """How full one bounded table is."""

    name: str
    size: int
    maximum: int


def table(core: Gossip) -> MemberTable:
    return core._table


def own_row(core: Gossip) -> Member:
    return core._own


def row(core: Gossip, name: str) -> Member | None:
    """What the core knows of a member; not to be changed."""
    return core._table.members.get(name)


def is_called(core: Gossip, address: Address) -> bool:
    """A Join to that address waits for its answer."""
    return core._contacts.call_to(address) > 0


def budgeted_packets(core: Gossip) -> int:
    """Sent so far, but for what goes outside the budget."""
    return core._outbox.sent.total() - core._outbox.unlimited


def has_left(core: Gossip) -> bool:
    return core._has_left


def table_sizes(core: Gossip) -> list[TableSize]:
    """Every table of a core that others fill."""
    detector = core._detector
    return [
        TableSize("members", len(core._table.members), MEMBERS_MAX),
        TableSize("tombstones", len(core._table.tombstones), TOMBSTONES_MAX),
        TableSize("probes", len(detector._probes), PROBES_MAX),
        TableSize("relays", len(detector._relays), RELAYS_MAX),
        TableSize("hasty probes", len(detector._hasty), HASTY_MAX),
        TableSize("lacking profiles", len(core._digests._lacking), LACKING_MAX),
        TableSize("reported duplicates", len(core._identity._told_at), DUPLICATES_MAX),
        TableSize("boots", len(core._sealer._boots), BOOTS_MAX),
    ]


def claims(core: Gossip) -> dict[str, tuple[object, ...]]:
    """All that merging may change, by member: to tell whether a datagram changed anything."""
    return {
        m.node_id: (m.generation, m.version, m.status, m.address, m.load_version, m.profile_version, m.accusers, m.hot)
        for m in core._table.members.values()
    }


def vouch(core: Gossip, record: Record) -> None:
    """Take what the process in this record sends, as on the word of one that is known."""
    core._reception.vouch(record.boot_id, record.address)
