"""Who comes and goes: joins, kills, restarts, farewells, duplicates."""

from __future__ import annotations

from statistics import median

from mesh.view import MemberStatus
from tests.simulation import inside
from tests.simulation.beliefs import all_healthy, all_see_gone
from tests.simulation.scenarios.settled import SETTLE_S, Figures, settle, stays_well
from tests.simulation.world import World

KNOWN_SHARE = 0.99  # of the others, in figures of a large mesh
LARGE_SETTLE_S = 30.0


def join(world: World, node_count: int) -> Figures:
    """All start at once; everybody sees everybody healthy."""
    world.add(node_count, spread_s=0.2)
    world.run_for(0.2)
    return {"joined_s": world.run_while(lambda: not all_healthy(world), SETTLE_S)}


def kill(world: World, node_count: int) -> Figures:
    """One process is gone without a word; all others find out, and none of them is taken for dead."""
    settle(world, node_count)
    victim = f"n{world.rng.randrange(node_count)}"
    world.run_for(world.rng.random())
    world.kill(victim)
    killed_at = world.now
    is_slow = world.network.loss or node_count > 100
    world.run_while(lambda: not world.all_see(victim, MemberStatus.DEAD), LARGE_SETTLE_S if is_slow else 10.0)
    deaths = world.deaths(killed_at)
    assert {t.change.after.node_id for t in deaths} == {victim}, world.describe()
    times = sorted({t.observer: t.at - killed_at for t in reversed(deaths)}.values())
    return {
        "detected_median_s": median(times),
        "detected_99%_s": times[int(len(times) * KNOWN_SHARE)],
        "detected_max_s": times[-1],
    }


def restart(world: World, node_count: int) -> Figures:
    """A killed node comes back under its name before or after it was found dead; healthy everywhere soon."""
    settle(world, node_count)
    victim = f"n{world.rng.randrange(node_count)}"
    world.kill(victim)
    world.run_for(world.rng.choice([0.5, 2.5, 8.0, 20.0]))
    world.start(victim)
    figures = {"back_s": world.run_while(lambda: not all_healthy(world), SETTLE_S if world.network.loss else 5.0)}
    stays_well(world)
    return figures


def lost_data(world: World, node_count: int) -> Figures:
    """A node comes back without its data directory, so with a generation it used before: it learns its own highest
    from its peers and outdoes it."""
    settle(world, node_count)
    victim = f"n{world.rng.randrange(node_count)}"
    for _ in range(world.rng.randrange(1, 4)):
        world.kill(victim)
        world.run_for(1.0)
        world.start(victim)
        world.run_for(3.0)
    former = inside.own_row(world.nodes[victim].core).generation
    world.kill(victim)
    world.run_for(world.rng.choice([0.5, 20.0]))
    world.start(victim, generation=1)
    figures = {"back_s": world.run_while(lambda: not all_healthy(world), SETTLE_S)}
    assert inside.own_row(world.nodes[victim].core).generation > former, world.describe()
    stays_well(world)
    return figures


def restart_all(world: World, node_count: int) -> Figures:
    """Every process dies and comes back at once."""
    settle(world, node_count)
    for name in list(world.nodes):
        world.kill(name)
    for name in list(world.nodes):
        world.at(world.now + world.rng.random(), world.start, name)
    world.run_for(1.0)
    figures = {"back_s": world.run_while(lambda: not all_healthy(world), SETTLE_S)}
    stays_well(world)
    return figures


def leave(world: World, node_count: int) -> Figures:
    """One says farewell: all know at once, and nobody ever takes it for dead."""
    settle(world, node_count)
    leaver = f"n{world.rng.randrange(node_count)}"
    left_at = world.now
    world.leave(leaver)
    if world.network.loss:
        # A farewell may be lost on all ways; then the leaver is found dead like any other.
        return {"gone_s": world.run_while(lambda: not all_see_gone(world, leaver), SETTLE_S)}
    took_s = world.run_while(lambda: not world.all_see(leaver, MemberStatus.LEFT), 1.0)
    world.run_for(5)
    assert not world.deaths(left_at), world.describe()
    return {"left_s": took_s}


def duplicate_id(world: World, node_count: int) -> Figures:
    """A second process starts under the name of one that runs: it is reported, nobody dies of it, and once it is gone
    the first one is well everywhere."""
    settle(world, node_count)
    began = world.now
    incumbent = f"n{world.rng.randrange(node_count)}"
    world.is_duplicate_meant = True
    world.place("second", ("n0",))
    world.start("second", node_id=incumbent)
    world.run_for(12.0)
    reports = [d for d in world.duplicates if d.node_id == incumbent]
    assert reports, f"nobody reported the second {incumbent}"
    # The second one is not answered, so what it believes itself is nothing to go by.
    others = [t for t in world.deaths(began) if t.observer != "second" and t.change.after.node_id != incumbent]
    assert not others, world.describe()
    world.kill("second")
    world.is_duplicate_meant = False
    figures = {"healed_s": world.run_while(lambda: not all_healthy(world), SETTLE_S)}
    stays_well(world)
    return figures
