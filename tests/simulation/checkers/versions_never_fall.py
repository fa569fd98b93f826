"""What one process knows of a member never gets older."""

from __future__ import annotations

from mesh.gossip import Gossip
from tests.simulation import inside
from tests.simulation.checkers.checker import Checker
from tests.simulation.sim_node import SimNode
from tests.simulation.world import World


class VersionsNeverFall(Checker):
    def __init__(self) -> None:
        self._seen: dict[str, tuple[Gossip, dict[str, tuple[int, int]]]] = {}  # by place: the process, claims by member

    def on_sample(self, world: World, node: SimNode) -> None:
        core, seen = self._seen.get(node.name, (None, {}))
        if core is not node.core:
            seen = {}
            self._seen[node.name] = node.core, seen
        for member in inside.table(node.core).members.values():
            claim = (member.generation, member.version)
            former = seen.get(member.node_id, (0, 0))
            assert claim >= former, f"{node.name} fell from {former} to {claim} about {member.node_id}"
            seen[member.node_id] = claim
