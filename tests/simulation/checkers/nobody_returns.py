"""Who is dead or left stays so until something newer comes from it."""

from __future__ import annotations

from mesh.gossip import MemberChanged
from mesh.view import MemberStatus
from tests.simulation.checkers.checker import Checker
from tests.simulation.sim_node import SimNode
from tests.simulation.world import World

GONE = (MemberStatus.DEAD, MemberStatus.LEFT)


class NobodyReturnsWithoutANewerVersion(Checker):
    def on_change(self, world: World, node: SimNode, change: MemberChanged) -> None:
        before, after = change.before, change.after
        if before is not None and before.status in GONE and after.status not in GONE:
            was, now = (before.generation, before.version), (after.generation, after.version)
            assert now > was, f"{after.node_id} returned to {node.name} at {now}, gone at {was}"
