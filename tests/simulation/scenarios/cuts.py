"""Networks that carry some ways and not others."""

from __future__ import annotations

from dataclasses import replace

from tests.simulation.beliefs import all_healthy
from tests.simulation.loads import profile_of
from tests.simulation.scenarios.settled import SETTLE_S, Figures, settle, stays_well
from tests.simulation.world import World

ASYMMETRIC_S = 120.0


def partition(world: World, node_count: int) -> Figures:
    """Two parts for a while; each finds the other dead, and after the heal all views agree again."""
    return _split(world, node_count, world.rng.randint(1, node_count - 1))


def halves(world: World, node_count: int) -> Figures:
    """The same with two halves."""
    return _split(world, node_count, node_count // 2)


def _split(world: World, node_count: int, cut_at: int) -> Figures:
    settle(world, node_count)
    names = list(world.nodes)
    world.rng.shuffle(names)
    world.network.partition([names[:cut_at], names[cut_at:]])
    world.disturbed_at = world.now
    world.run_for(world.rng.choice([2.0, 12.0, 30.0]))
    world.set_profile(names[0], replace(profile_of(names[0]), version="0.2.0"))
    world.heal()
    figures = {"healed_s": world.run_while(lambda: not all_healthy(world), SETTLE_S)}
    stays_well(world)
    return figures


def one_way_cut(world: World, node_count: int) -> Figures:
    """One node hears nothing from half of its peers, which hear it: nobody is taken for dead."""
    return _deaf(world, node_count, 20.0)


def asymmetric_cut(world: World, node_count: int) -> Figures:
    """The same for 120 s."""
    return _deaf(world, node_count, ASYMMETRIC_S)


def _deaf(world: World, node_count: int, duration_s: float) -> Figures:
    settle(world, node_count)
    began = world.now
    deaf, *others = sorted(world.nodes, key=lambda _: world.rng.random())
    world.cut({(other, deaf) for other in others[: max(1, len(others) // 2)]})
    world.run_for(duration_s)
    if node_count > 2:
        assert not world.deaths(began), world.describe()
    world.heal()
    return {"healed_s": world.run_while(lambda: not all_healthy(world), SETTLE_S)}


def cut_pair(world: World, node_count: int) -> Figures:
    """Two nodes cannot reach each other, everybody else can reach both: nobody is taken for dead."""
    settle(world, node_count)
    began = world.now
    a, b = world.rng.sample(list(world.nodes), 2)
    world.cut({(a, b), (b, a)})
    world.run_for(30.0)
    if node_count > 2:
        assert not world.deaths(began), world.describe()
    world.heal()
    return {"healed_s": world.run_while(lambda: not all_healthy(world), SETTLE_S)}
