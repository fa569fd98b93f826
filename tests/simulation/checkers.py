"""The invariants of the mesh, one class each, checked while a world runs."""

from __future__ import annotations

from mesh.gossip import MemberChanged
from mesh.view import ClusterView, MemberStatus
from mesh.wire import DATAGRAM_BYTES_MAX
from tests.simulation.world import Checker, SimNode, World

GONE = (MemberStatus.DEAD, MemberStatus.LEFT)


class Silent:
    """Checks nothing; what a checker does not look at."""

    def on_send(self, world: World, node: SimNode, data: bytes) -> None:
        return

    def on_change(self, world: World, node: SimNode, change: MemberChanged) -> None:
        return

    def on_sample(self, world: World, node: SimNode, view: ClusterView) -> None:
        return


class VersionsNeverFall(Silent):
    """What one process knows of a member never gets older."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, int, str], tuple[int, int]] = {}  # by process and member

    def on_sample(self, world: World, node: SimNode, view: ClusterView) -> None:
        for member in view.members.values():
            key = (node.name, node.generation, member.node_id)
            claim = (member.generation, member.version)
            former = self._seen.get(key, (0, 0))
            assert claim >= former, f"{node.name} fell from {former} to {claim} about {member.node_id}"
            self._seen[key] = claim


class OnlyTheOwnerRaisesItsVersion(Silent):
    """Nobody knows a version of a member that the member itself has not published."""

    def __init__(self) -> None:
        self._published: dict[str, tuple[int, int]] = {}

    def on_send(self, world: World, node: SimNode, data: bytes) -> None:
        own = node.core.view(world.now).me if node.gossip else None
        if own is not None:
            claim = (own.generation, own.version)
            self._published[node.name] = max(claim, self._published.get(node.name, (0, 0)))

    def on_change(self, world: World, node: SimNode, change: MemberChanged) -> None:
        self._check(node, change.after.node_id, (change.after.generation, change.after.version))

    def on_sample(self, world: World, node: SimNode, view: ClusterView) -> None:
        for member in view.members.values():
            if not member.is_self:
                self._check(node, member.node_id, (member.generation, member.version))

    def _check(self, node: SimNode, member: str, claim: tuple[int, int]) -> None:
        published = self._published.get(member, (0, 0))
        assert claim <= published, f"{node.name} holds {claim} of {member}, which published {published}"


class NobodyReturnsWithoutANewerVersion(Silent):
    """Who is dead or left stays so until something newer comes from it."""

    def on_change(self, world: World, node: SimNode, change: MemberChanged) -> None:
        before, after = change.before, change.after
        if before is not None and before.status in GONE and after.status not in GONE:
            was, now = (before.generation, before.version), (after.generation, after.version)
            assert now > was, f"{after.node_id} returned to {node.name} at {now}, gone at {was}"


class DatagramsFit(Silent):
    """No datagram is larger than any path carries whole."""

    def on_send(self, world: World, node: SimNode, data: bytes) -> None:
        assert len(data) <= DATAGRAM_BYTES_MAX, f"{node.name} sent {len(data)} bytes"


class PacketsStayWithinTheBudget(Silent):
    """Over any time, at most the burst and the rate; answers to strangers and joins, and farewells apart."""

    def __init__(self) -> None:
        self._level: dict[tuple[str, int], tuple[float, float, int]] = {}  # by process: over the rate, as of, packets

    def on_send(self, world: World, node: SimNode, data: bytes) -> None:
        config, statistics = world.config, node.core.statistics()
        process = (node.name, node.generation)
        packets = sum(statistics.packets_sent.values()) - statistics.packets_unlimited
        level, since, before = self._level.get(process, (0.0, world.now, 0))
        level = max(0.0, level - (world.now - since) * config.packet_rate) + packets - before
        assert level <= config.packet_burst + 1e-6, f"{node.name} sent {level:.1f} packets over its rate"
        self._level[process] = (level, world.now, packets)


class QueuesStayBounded(Silent):
    """What waits to be told, and the suspicions watched, never outgrow the number of members."""

    def on_sample(self, world: World, node: SimNode, view: ClusterView) -> None:
        statistics = node.core.statistics()
        # A member may be urgent news and a load at once.
        assert statistics.rumours_waiting <= 2 * statistics.members
        # Each suspicion is watched once and again with each of three accusers, twice the longest suspicion long.
        assert statistics.suspicions_watched <= 16 * statistics.members


def all_checkers() -> list[Checker]:
    return [
        VersionsNeverFall(),
        OnlyTheOwnerRaisesItsVersion(),
        NobodyReturnsWithoutANewerVersion(),
        DatagramsFit(),
        PacketsStayWithinTheBudget(),
        QueuesStayBounded(),
    ]
