"""What waits to be told, and the suspicions watched, never outgrow the number of members."""

from __future__ import annotations

from tests.simulation.checkers.checker import Checker
from tests.simulation.sim_node import SimNode
from tests.simulation.world import World


class QueuesStayBounded(Checker):
    def on_sample(self, world: World, node: SimNode) -> None:
        statistics = node.core.statistics()
        # A member may be urgent news and a load, or a sign of life, at once.
        waiting, watched = statistics.rumours_waiting, statistics.suspicions_watched
        assert waiting <= 2 * statistics.members, f"{node.name} has {waiting} rumours on {statistics.members} members"
        # Each suspicion is watched once and again with each of three accusers, twice the longest suspicion long.
        assert watched <= 16 * statistics.members, f"{node.name} watches {watched} of {statistics.members} members"
