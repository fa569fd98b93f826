"""Over any time a node sends at most the burst and the rate, on its own clock; a farewell apart."""

from __future__ import annotations

from mesh.gossip import Gossip
from tests.simulation import inside
from tests.simulation.checkers.checker import Checker
from tests.simulation.sim_node import SimNode
from tests.simulation.world import World

ROUNDING = 1e-6  # of packets, that sums of floats may be off


class PacketsStayWithinTheBudget(Checker):
    def __init__(self) -> None:
        self._level: dict[str, tuple[Gossip, float, float]] = {}  # by place: process, packets over the rate, as of

    def on_send(self, world: World, node: SimNode, data: bytes) -> None:
        core = node.core
        if inside.has_left(core):
            return
        config, clock = world.config, node.clock(world.now)
        of, level, since = self._level.get(node.name, (core, 0.0, clock))
        if of is not core:
            level, since = 0.0, clock
        level = max(0.0, level - (clock - since) * config.packet_rate) + 1
        assert level <= config.packet_burst + ROUNDING, f"{node.name} sent {level:.1f} packets over its rate"
        self._level[node.name] = (core, level, clock)
