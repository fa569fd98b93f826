"""What nodes say of themselves, and how soon others know it at what cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import median

from mesh.view import NodeLoad, NodeStatus, Readiness
from tests.simulation import inside
from tests.simulation.beliefs import all_know_readiness, knowing_share
from tests.simulation.loads import ready_load, wide_load
from tests.simulation.scenarios.settled import SETTLE_S, Figures, settle
from tests.simulation.world import World

FRESH_S = 10.0  # how long loads are watched
WARM_UP_S = 5.0  # before that
CHANGES = 10  # nodes whose load changes, and is followed
WATCHED_MAX = 30  # nodes whose tables are looked at for freshness: to look costs more than to run


def drain(world: World, node_count: int) -> Figures:
    """A node says that it drains: all know within a second, long before its next publication in a large mesh."""
    settle(world, node_count)
    name = f"n{world.rng.randrange(node_count)}"
    world.set_load(name, replace(ready_load(name, 1), readiness=Readiness.DRAINING))
    took_s = world.run_while(
        lambda: not all_know_readiness(world, name, Readiness.DRAINING),
        SETTLE_S if world.network.loss else 1.0,
        step_s=0.005,
    )
    if not world.network.loss:
        assert all(v.counts()[NodeStatus.DEGRADED] == 1 for v in [world.view(n.name) for n in world.running])
    return {"known_s": took_s}


def fresh(world: World, node_count: int) -> Figures:
    """Publications of a quiet mesh: what share of them each peer sees, how far apart, at what cost."""
    return _watch(world, node_count, None)


def busy(world: World, node_count: int) -> Figures:
    """The same while every node's load changes each second."""
    return _watch(world, node_count, ready_load_at)


def wide(world: World, node_count: int) -> Figures:
    """The same with loads of 300 bytes."""
    return _watch(world, node_count, lambda _, step: wide_load(step))


def ready_load_at(name: str, step: int) -> NodeLoad:
    return ready_load(name, step)


def _watch(world: World, node_count: int, load: Callable[[str, int], NodeLoad] | None) -> Figures:
    settle(world, node_count)
    if load is not None:
        for node in world.running:
            world.at(world.now + world.rng.random(), _keep_changing, world, node.name, load, 1)
    world.run_for(WARM_UP_S)
    began, sent = world.now, sum(n.core.statistics().bytes_sent for n in world.running)
    packets = world.datagrams
    published = {n.name: inside.own_row(n.core).load_version for n in world.running}
    watched = world.running[:WATCHED_MAX]
    last: dict[tuple[str, str], tuple[float, int]] = {}
    gaps: list[float] = []
    ages: list[float] = []
    seen = 0
    while world.now < began + FRESH_S:
        world.run_for(0.01)
        for node in watched:
            clock = node.clock(world.now)
            for member in inside.table(node.core).live:
                key = (node.name, member.node_id)
                at, version = last.get(key, (0.0, 0))
                if member.load_version != version:
                    if version:
                        seen += 1
                        gaps.append(world.now - at)
                    last[key] = (world.now, member.load_version)
                if world.rng.random() < 0.001:
                    ages.append(clock - member.load_at)
    gaps.sort()
    ages.sort()
    made = sum(inside.own_row(world.nodes[name].core).load_version - v for name, v in published.items())
    bytes_sent = sum(n.core.statistics().bytes_sent for n in world.running) - sent
    return {
        # What is on its way at the beginning counts for what is on its way at the end.
        "seen_share": seen / (made * len(watched) * (node_count - 1) / node_count),
        "gap_median_s": gaps[len(gaps) // 2],
        "gap_p95_s": gaps[int(len(gaps) * 0.95)],
        "gap_max_s": gaps[-1],
        "packets_per_node_s": (world.datagrams - packets) / node_count / FRESH_S,
        "bytes_out_per_node_s": bytes_sent / node_count / FRESH_S,
    }


def _keep_changing(world: World, name: str, load: Callable[[str, int], NodeLoad], step: int) -> None:
    if world.nodes[name].gossip is not None:
        world.set_load(name, load(name, step))
        world.at(world.now + 1.0, _keep_changing, world, name, load, step + 1)


def load_change(world: World, node_count: int) -> Figures:
    """A few loads change by a little, not urgently, in a mesh that is otherwise quiet: until 99 % know."""
    return _change(world, node_count)


def busy_load_change(world: World, node_count: int) -> Figures:
    """The same while one node in ten changes its load each second."""
    settle(world, node_count)
    for node in world.running[::10]:
        world.at(world.now + world.rng.random(), _keep_changing, world, node.name, ready_load_at, 1)
    world.run_for(WARM_UP_S)
    return _change(world, node_count)


def _change(world: World, node_count: int) -> Figures:
    if not world.nodes:
        settle(world, node_count)
    bytes_before = sum(n.core.statistics().bytes_sent for n in world.running)
    began = world.now
    names = world.rng.sample(list(world.nodes), min(CHANGES, node_count))
    versions: dict[str, int] = {}
    for i, name in enumerate(names):
        world.set_load(name, ready_load(name, 1_000 + i, queued=1 + i))
        versions[name] = inside.own_row(world.nodes[name].core).load_version + 1
    times: dict[str, float] = {}

    def is_on_its_way() -> bool:
        for name, version in versions.items():
            if name not in times and knowing_share(world, name, version) >= 0.99:
                times[name] = world.now - began
        return len(times) < len(names)

    world.run_while(is_on_its_way, SETTLE_S)
    bytes_sent = sum(n.core.statistics().bytes_sent for n in world.running) - bytes_before
    return {
        "known_to_99%_median_s": median(times.values()),
        "known_to_99%_max_s": max(times.values()),
        "bytes_out_per_node_s": bytes_sent / node_count / (world.now - began),
    }
