"""What a checker may look at. Each method raises AssertionError where the invariant is broken."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.gossip import MemberChanged
from mesh.view import Address

if TYPE_CHECKING:
    from tests.simulation.sim_node import SimNode
    from tests.simulation.world import World


class Checker:
    """Checks nothing. The world calls only what a class of its own defines."""

    def on_send(self, world: World, node: SimNode, data: bytes) -> None:
        """The node's core asked for this datagram to be sent."""

    def before_receive(self, world: World, node: SimNode, data: bytes, source: Address) -> None:
        """The core is about to be given this datagram."""

    def after_receive(self, world: World, node: SimNode, data: bytes, source: Address) -> None:
        """The core was given it."""

    def on_change(self, world: World, node: SimNode, change: MemberChanged) -> None:
        """The core reported this change."""

    def on_sample(self, world: World, node: SimNode) -> None:
        """Some time has passed; the node runs and does not stand still."""
