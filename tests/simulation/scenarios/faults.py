"""Processes that stand still, clocks that run wrong, networks that lose."""

from __future__ import annotations

import math
from dataclasses import replace

from mesh.view import MemberStatus
from tests.simulation.beliefs import all_healthy
from tests.simulation.loads import profile_of, ready_load
from tests.simulation.scenarios.settled import SETTLE_S, Figures, settle
from tests.simulation.world import World

STALL_S = 3.0
STALL_EVERY_S = 15.0  # between two stalls of one of the nodes that have them
STALLS_S = 120.0  # how long a mesh with stalls is watched
STALLING_SHARE = 0.1
BAD_CLOCK_DRIFT = 0.01


def loss(world: World, node_count: int) -> Figures:
    """A third of all datagrams is lost, some come twice: nobody is taken for dead, and loads stay fresh."""
    world.network.loss = max(world.network.loss, 0.3)
    world.network.duplication = 0.05
    settle(world, node_count)
    began = world.now
    fresh = looked = 0
    for step in range(10):
        name = f"n{step % node_count}"
        world.set_load(name, ready_load(name, step + 1))
        if step == 5:
            world.set_profile(name, replace(profile_of(name), version="0.3.0"))
        world.run_for(2.0)
        for node in world.running:
            view = world.view(node.name)
            looked += len(view.members) - 1
            fresh += sum(m.load_age_s < 2.5 for m in view.members.values() if not m.is_self)
    assert not world.deaths(began), world.describe()
    world.run_while(lambda: not all_healthy(world), SETTLE_S)
    return {"fresh_share": fresh / looked}


def endure(world: World, node_count: int) -> Figures:
    """Ten minutes with what loss there is: false deaths and suspicions in an hour of a node."""
    settle(world, node_count)
    began = world.now
    suspicions = sum(n.core.statistics().suspicions for n in world.running)
    world.run_for(600.0)
    hours = node_count * (world.now - began) / 3600
    raised = sum(n.core.statistics().suspicions for n in world.running) - suspicions
    return {
        "node_hours": hours,
        "false_deaths_per_node_hour": len(_declared(world, began)) / hours,
        "suspicions_per_node_hour": raised / hours,
    }


def stall(world: World, node_count: int) -> Figures:
    """One process stands still for three seconds, as under swapping: nobody is taken for dead, by nobody."""
    settle(world, node_count)
    began = world.now
    world.run_for(world.rng.random())
    world.stall(f"n{world.rng.randrange(node_count)}", STALL_S)
    world.run_for(12.0)
    assert not world.deaths(began), world.describe()
    return {"recovered_s": world.run_while(lambda: not all_healthy(world), 5.0)}


def stalls(world: World, node_count: int) -> Figures:
    """One node in ten stands still for three seconds every fifteen: false deaths in an hour of a node."""
    settle(world, node_count)
    began = world.now
    stalling = world.rng.sample(list(world.nodes), math.ceil(node_count * STALLING_SHARE))
    for name in stalling:
        at = world.now + world.rng.random() * STALL_EVERY_S
        while at < began + STALLS_S - STALL_S:
            world.at(at, world.stall, name, STALL_S)
            at += STALL_EVERY_S * world.rng.uniform(0.5, 1.5)
    world.run_for(STALLS_S)
    hours = node_count * STALLS_S / 3600
    return {
        "false_deaths_per_node_hour": len(_declared(world, began)) / hours,
        "healed_s": world.run_while(lambda: not all_healthy(world), SETTLE_S),
    }


def _declared(world: World, since: float) -> set[tuple[str, int, int]]:
    """Deaths of nodes that run, each counted once however many heard of it: (name, generation, version)."""
    return {
        (t.change.after.node_id, t.change.after.generation, t.change.after.version)
        for t in world.deaths(since)
        if world.nodes[t.change.after.node_id].gossip is not None
    }


def clock_skew(world: World, node_count: int) -> Figures:
    """Clocks that are wrong by up to one part in a hundred: nobody is suspected for it, and a kill is found."""
    world.clock_drift = BAD_CLOCK_DRIFT
    settle(world, node_count)
    began = world.now
    world.run_for(60.0)
    assert not world.deaths(began), world.describe()
    assert all_healthy(world) or world.network.loss, world.describe()
    victim = f"n{world.rng.randrange(node_count)}"
    world.kill(victim)
    return {"detected_max_s": world.run_while(lambda: not world.all_see(victim, MemberStatus.DEAD), SETTLE_S)}
