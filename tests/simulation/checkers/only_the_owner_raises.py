"""Nobody knows a version of a member that the member itself has not published."""

from __future__ import annotations

from mesh.gossip import MemberChanged
from tests.simulation import inside
from tests.simulation.checkers.checker import Checker
from tests.simulation.sim_node import SimNode
from tests.simulation.world import World


class OnlyTheOwnerRaisesItsVersion(Checker):
    def __init__(self) -> None:
        self._published: dict[str, tuple[int, int]] = {}  # by node id, of all processes that ever used it

    def on_send(self, world: World, node: SimNode, data: bytes) -> None:
        self._note(node)

    def _note(self, node: SimNode) -> None:
        own = inside.own_row(node.core)
        claim = (own.generation, own.version)
        if claim > self._published.get(own.node_id, (0, 0)):
            self._published[own.node_id] = claim

    def on_change(self, world: World, node: SimNode, change: MemberChanged) -> None:
        self._check(world, node, change.after.node_id, (change.after.generation, change.after.version))

    def on_sample(self, world: World, node: SimNode) -> None:
        for member in inside.table(node.core).members.values():
            if member.node_id != node.core.node_id:
                self._check(world, node, member.node_id, (member.generation, member.version))

    def _check(self, world: World, node: SimNode, member: str, claim: tuple[int, int]) -> None:
        owner = world.nodes.get(member)
        if owner is not None and owner.gossip is not None and claim > self._published.get(member, (0, 0)):
            self._note(owner)  # which has published without a datagram, having had nobody to send it to
        published = self._published.get(member, (0, 0))
        assert claim <= published, f"{node.name} holds {claim} of {member}, which published {published}"
