"""Versions of the protocol beside each other."""

from __future__ import annotations

from mesh.view import MemberStatus
from tests.simulation.beliefs import all_healthy
from tests.simulation.dialects import incompatible, later
from tests.simulation.scenarios.settled import SETTLE_S, Figures, settle, stays_well
from tests.simulation.world import World


def mixed_versions(world: World, node_count: int) -> Figures:
    """Half of the mesh speaks a later version with more fields, as during an upgrade: it is one mesh. A node of a
    version that shares none with them stays alone and is counted."""
    names = [world.place(f"n{i}").name for i in range(node_count)]
    for name in names[::2]:
        world.set_dialect(name, later)
    for name in names:
        world.at(world.now + world.rng.random() * 0.2, world.start, name)
    world.run_for(0.2)
    joined_s = world.run_while(lambda: not all_healthy(world), SETTLE_S)
    stays_well(world)
    world.place("stranger")
    world.set_dialect("stranger", incompatible)
    world.start("stranger")
    world.run_for(4.0)
    assert list(world.view("stranger").members) == ["stranger"], world.describe()
    assert all(world.status(name, "stranger") is None for name in names), world.describe()
    assert world.nodes["n0"].core.statistics().rejects["protocol version"] > 0
    world.kill("stranger")
    victim = names[-1]
    world.kill(victim)
    world.run_while(lambda: not world.all_see(victim, MemberStatus.DEAD), SETTLE_S)
    return {"joined_s": joined_s}


def upgrade(world: World, node_count: int) -> Figures:
    """One node after the other comes back speaking a later version: nobody is taken for dead on the way."""
    settle(world, node_count)
    began = world.now
    for name in list(world.nodes):
        world.kill(name)
        world.set_dialect(name, later)
        world.run_for(0.5)
        world.start(name)
        world.run_for(1.0)
    figures = {"healed_s": world.run_while(lambda: not all_healthy(world), SETTLE_S)}
    assert not world.deaths(began), world.describe()
    return figures
