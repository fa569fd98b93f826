"""A healthy mesh to begin with, and to end with."""

from __future__ import annotations

from tests.simulation import inside
from tests.simulation.beliefs import all_healthy
from tests.simulation.world import World

Figures = dict[str, float]
SETTLE_S = 15.0  # views agree within this after anything
ACQUAINTED_NODES = 100  # from here on a mesh begins with everybody knowing everybody: to join is a scenario of its own


def settle(world: World, node_count: int) -> None:
    """All start and find each other; in a large mesh they begin as if they had, which is much less to compute."""
    if node_count < ACQUAINTED_NODES:
        world.add(node_count, spread_s=0.2)
        world.run_for(0.2)
        world.run_while(lambda: not all_healthy(world), SETTLE_S)
        world.run_for(2.0)
        return
    world.add(node_count, seeds=(), spread_s=2.0)
    world.run_for(2.0)
    acquaint(world)
    world.run_for(5.0)
    world.transitions.clear()


def acquaint(world: World) -> None:
    """Everybody learns what everybody is, as by a full-state exchange."""
    records = [inside.own_row(node.core).record(with_warm=True, with_bulk=False) for node in world.running]
    for node in world.running:
        table = inside.table(node.core)
        for record in world.rng.sample(records, len(records)):
            plan = table.plan(record) if record.node_id != node.core.node_id else None
            if plan is not None:
                table.apply(plan, node.clock(world.now), told_by="")
                inside.vouch(node.core, record)


def stays_well(world: World) -> None:
    """Nothing that happened is found out late."""
    since = world.now
    world.run_for(6.0)
    assert not world.deaths(since), world.describe()
    assert all_healthy(world) or world.network.loss, world.describe()
