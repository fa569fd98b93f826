"""What happens to a mesh, each a function that asserts what must hold and returns figures to print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from statistics import median

from mesh.view import MemberStatus, NodeStatus, Readiness
from tests.simulation.world import World, profile_of, ready_load

Figures = dict[str, float]
SETTLE_S = 15.0  # views agree within this after anything
FRESH_S = 10.0  # how long a quiet mesh is watched


def join(world: World, node_count: int) -> Figures:
    """All start at once; everybody sees everybody healthy."""
    world.add(node_count, spread_s=0.2)
    world.run_for(0.2)
    return {"joined_s": world.run_while(lambda: not world.all_healthy(), SETTLE_S)}


def kill(world: World, node_count: int) -> Figures:
    """One process is gone without a word; all others find out, and none of them is taken for dead."""
    settle(world, node_count)
    victim = f"n{world.rng.randrange(node_count)}"
    world.run_for(world.rng.random())
    world.kill(victim)
    killed_at = world.now
    world.run_while(lambda: not world.all_see(victim, MemberStatus.DEAD), SETTLE_S if world.network.loss else 10.0)
    deaths = world.deaths(killed_at)
    assert {t.change.after.node_id for t in deaths} == {victim}, world.describe()
    times = [t.at - killed_at for t in deaths]
    return {"detected_median_s": median(times), "detected_max_s": max(times)}


def restart(world: World, node_count: int) -> Figures:
    """A killed node comes back under its name before or after it was found dead; healthy everywhere soon."""
    settle(world, node_count)
    victim = f"n{world.rng.randrange(node_count)}"
    world.kill(victim)
    world.run_for(world.rng.choice([0.5, 2.5, 8.0, 20.0]))
    world.start(victim)
    generation = world.nodes[victim].generation

    def is_back() -> bool:
        seen = [world.view(n.name).members[victim].generation for n in world.running if n.name != victim]
        return all(g == generation for g in seen) and world.all_healthy()

    figures = {"back_s": world.run_while(lambda: not is_back(), SETTLE_S if world.network.loss else 5.0)}
    stays_well(world)
    return figures


def restart_all(world: World, node_count: int) -> Figures:
    """Every process dies and comes back at once."""
    settle(world, node_count)
    for name in list(world.nodes):
        world.kill(name)
    for name in list(world.nodes):
        world.at(world.now + world.rng.random(), lambda name=name: world.start(name))  # type: ignore[misc]
    world.run_for(1.0)
    figures = {"back_s": world.run_while(lambda: not world.all_healthy(), SETTLE_S)}
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


def partition(world: World, node_count: int) -> Figures:
    """Two halves for a while; each finds the other dead, and after the heal all views agree again."""
    settle(world, node_count)
    names = list(world.nodes)
    world.rng.shuffle(names)
    cut_at = world.rng.randint(1, node_count - 1)
    world.network.partition([names[:cut_at], names[cut_at:]])
    world.run_for(world.rng.choice([2.0, 12.0, 30.0]))
    world.set_profile(names[0], replace(profile_of(names[0]), version="0.2.0"))
    world.network.heal()
    figures = {"healed_s": world.run_while(lambda: not world.all_healthy(), SETTLE_S)}
    stays_well(world)
    return figures


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
    world.run_while(lambda: not world.all_healthy(), SETTLE_S)
    return {"fresh_share": fresh / looked}


def stall(world: World, node_count: int) -> Figures:
    """One process stands still for three seconds, as under swapping: nobody is taken for dead, by nobody."""
    settle(world, node_count)
    began = world.now
    world.run_for(world.rng.random())
    world.stall(f"n{world.rng.randrange(node_count)}", 3.0)
    world.run_for(12.0)
    assert not world.deaths(began), world.describe()
    return {"recovered_s": world.run_while(lambda: not world.all_healthy(), 5.0)}


def one_way_cut(world: World, node_count: int) -> Figures:
    """One node hears nothing from half of its peers, which hear it: nobody is taken for dead."""
    settle(world, node_count)
    began = world.now
    deaf, *others = sorted(world.nodes, key=lambda _: world.rng.random())
    world.network.cuts = {(other, deaf) for other in others[: max(1, len(others) // 2)]}
    world.run_for(20.0)
    if node_count > 2:
        assert not world.deaths(began), world.describe()
    world.network.heal()
    return {"healed_s": world.run_while(lambda: not world.all_healthy(), SETTLE_S)}


def drain(world: World, node_count: int) -> Figures:
    """A node says that it drains: all know within a second, long before its next publication in a large mesh."""
    settle(world, node_count)
    name = f"n{world.rng.randrange(node_count)}"
    world.set_load(name, replace(ready_load(name, 1), readiness=Readiness.DRAINING))

    def all_know() -> bool:
        views = [world.view(n.name) for n in world.running]
        return all(v.members[name].load.readiness is Readiness.DRAINING for v in views)

    took_s = world.run_while(lambda: not all_know(), SETTLE_S if world.network.loss else 1.0, step_s=0.005)
    if not world.network.loss:
        assert all(v.counts()[NodeStatus.DEGRADED] == 1 for v in [world.view(n.name) for n in world.running])
    return {"known_s": took_s}


def fresh(world: World, node_count: int) -> Figures:
    """Publications of a quiet mesh: what share of them each peer sees, how far apart, at what cost."""
    settle(world, node_count)
    world.run_for(3.0)
    began, sent = world.now, sum(n.core.statistics().bytes_sent for n in world.running)
    packets = world.datagrams
    published = {n.name: world.view(n.name).me.load_version for n in world.running}
    seen: dict[tuple[str, str], list[tuple[float, int]]] = {}
    while world.now < began + FRESH_S:
        world.run_for(0.02)
        for node in world.running:
            for member in world.view(node.name).members.values():
                rows = seen.setdefault((node.name, member.node_id), [])
                if not member.is_self and (not rows or rows[-1][1] != member.load_version):
                    rows.append((world.now, member.load_version))
    gaps = sorted(b[0] - a[0] for rows in seen.values() for a, b in pairwise(rows))
    made = sum(world.view(name).me.load_version - version for name, version in published.items())
    bytes_sent = sum(n.core.statistics().bytes_sent for n in world.running) - sent
    return {
        "seen_share": sum(max(0, len(rows) - 1) for rows in seen.values()) / (made * (node_count - 1)),
        "gap_p95_s": gaps[int(len(gaps) * 0.95)],
        "gap_max_s": gaps[-1],
        "packets_per_node_s": (world.datagrams - packets) / node_count / FRESH_S,
        "bytes_per_node_s": bytes_sent / node_count / FRESH_S,
    }


def settle(world: World, node_count: int) -> None:
    """A healthy mesh to begin with."""
    join(world, node_count)
    world.run_for(2.0)


def all_see_gone(world: World, name: str) -> bool:
    return all(world.status(n.name, name) in (MemberStatus.LEFT, MemberStatus.DEAD) for n in world.running)


def stays_well(world: World) -> None:
    """Nothing that happened is found out late."""
    since = world.now
    world.run_for(6.0)
    assert not world.deaths(since), world.describe()
    assert world.all_healthy() or world.network.loss, world.describe()


SCENARIOS: dict[str, Callable[[World, int], Figures]] = {
    "join": join,
    "kill": kill,
    "restart": restart,
    "restart-all": restart_all,
    "leave": leave,
    "partition": partition,
    "loss": loss,
    "stall": stall,
    "one-way-cut": one_way_cut,
    "drain": drain,
    "fresh": fresh,
}
