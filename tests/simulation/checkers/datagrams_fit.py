"""No datagram is larger than any path carries whole."""

from __future__ import annotations

from mesh.wire import DATAGRAM_BYTES_MAX
from tests.simulation.checkers.checker import Checker
from tests.simulation.sim_node import SimNode
from tests.simulation.world import World


class DatagramsFit(Checker):
    def on_send(self, world: World, node: SimNode, data: bytes) -> None:
        assert len(data) <= DATAGRAM_BYTES_MAX, f"{node.name} sent {len(data)} bytes of {DATAGRAM_BYTES_MAX}"
