"""Over any time a node sends at most the burst and the rate, on its own clock; what goes outside the budget apart."""

from __future__ import annotations

from mesh.gossip import Gossip
from tests.simulation import inside
from tests.simulation.checkers.checker import Checker
from tests.simulation.sim_node import SimNode
from tests.simulation.world import World

ROUNDING = 1e-6  # of packets, that sums of floats may be off


class PacketsStayWithinTheBudget(Checker):
    def __init__(self) -> None:
        # By place: process, packets over the rate, as of, packets sent so far.
        self._level: dict[str, tuple[Gossip, float, float, int]] = {}

    def on_send(self, world: World, node: SimNode, data: bytes) -> None:
        core = node.core
        if inside.has_left(core):
            return
        config, clock = world.config, node.clock(world.now)
        packets = inside.budgeted_packets(core)
        of, level, since, before = self._level.get(node.name, (core, 0.0, clock, 0))
        if of is not core:
            level, since, before = 0.0, clock, 0
        level = max(0.0, level - (clock - since) * config.packet_rate) + packets - before
        assert level <= config.packet_burst + ROUNDING, f"{node.name} sent {level:.1f} packets over its rate"
        self._level[node.name] = (core, level, clock, packets)
