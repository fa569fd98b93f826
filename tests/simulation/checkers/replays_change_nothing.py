"""A datagram that comes again, or back to its sender, changes nothing but the count of rejected ones.

It injects them itself: of what a node was given, one in ten once more a little later, and once to its sender."""

from __future__ import annotations

import random

from mesh.gossip import Gossip, SendDatagram
from mesh.view import Address
from tests.simulation import inside
from tests.simulation.checkers.checker import Checker
from tests.simulation.sim_node import SimNode
from tests.simulation.world import World

SHARE = 0.1
LATER_S = 3.0  # at most; the replay window is a minute of packets


STRANGER = "stranger"


class ReplaysChangeNothing(Checker):
    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._is_mine = False
        self._strangers = 0  # of the node that is given a datagram, before it is
        self.count = 0

    def after_receive(self, world: World, node: SimNode, data: bytes, source: Address) -> None:
        was_taken = node.core.statistics().strangers == self._strangers
        if not self._is_mine and was_taken and self._rng.random() < SHARE:
            at = world.now + self._rng.random() * LATER_S
            world.at(at, self._inject, world, node, node.core, data, source, ("replayed", "protocol version"))
            sender = next((n for n in world.running if n.address == source), None)
            if sender is not None:
                world.at(at, self._inject, world, sender, sender.core, data, node.address, ("reflected", "unknown key"))

    def before_receive(self, world: World, node: SimNode, data: bytes, source: Address) -> None:
        self._strangers = node.core.statistics().strangers

    def _inject(
        self, world: World, node: SimNode, core: object, data: bytes, source: Address, reasons: tuple[str, ...]
    ) -> None:
        if node.gossip is not core or node.stalled_until > world.now:
            return
        before, rejects = inside.claims(node.core), _rejects(node.core)
        self._is_mine = True
        effects = node.core.receive(data, source, node.clock(world.now))
        self._is_mine = False
        counted = _rejects(node.core)
        grown = {reason for reason in counted if counted[reason] != rejects.get(reason, 0)}
        assert grown <= {*reasons, STRANGER}, f"{node.name} took a datagram again, rejected for {grown or 'nothing'}"
        assert grown, f"{node.name} took a datagram again that it should have rejected as {reasons[0]}"
        if grown == {STRANGER}:
            answers = sum(len(effect.data) for effect in effects if isinstance(effect, SendDatagram))
            is_called = inside.is_called(node.core, source)  # who was called is answered in full
            assert answers <= len(data) or is_called, f"{node.name} answered {len(data)} bytes with {answers}"
        else:
            assert not effects, f"{node.name} answered a datagram that came again with {effects}"
        assert inside.claims(node.core) == before, f"{node.name} was changed by a datagram that came again"
        self.count += 1


def _rejects(core: Gossip) -> dict[str, int]:
    """By reason; a datagram of a process not admitted yet is not taken either."""
    statistics = core.statistics()
    return {**statistics.rejects, STRANGER: statistics.strangers}
