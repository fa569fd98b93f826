"""The routing simulator on a few nodes: what the router owes at 80 % load. Larger meshes: docs/routing.md."""

from __future__ import annotations

from functools import lru_cache

import pytest

from tests.simulation.routing.__main__ import Summary, medians, summary
from tests.simulation.routing.policies import POLICIES
from tests.simulation.routing.traces import Trace
from tests.simulation.routing.world import Setting, World

SEEDS = range(3)
NODES = 6
SECONDS = 100.0


@lru_cache
def figures(policy: str, trace: Trace) -> Summary:
    settings = [Setting(NODES, 0.8, trace, seed, SECONDS, entries=4) for seed in SEEDS]
    return medians([summary(World(setting, POLICIES[policy]).run(), setting) for setting in settings])


def of(policy: str, trace: Trace, column: str) -> float:
    value = figures(policy, trace)[column]
    assert value is not None
    return value


@pytest.mark.parametrize("trace", ["poisson", "bursts", "chats"])
def test_first_tokens_come_nearly_as_soon_as_with_perfect_knowledge(trace: Trace) -> None:
    assert of("router", trace, "mean_s") <= 1.1 * of("least outstanding", trace, "mean_s")


def test_shared_beginnings_are_computed_once_and_nobody_waits_for_it() -> None:
    assert of("router", "chats", "prefill_tokens") <= 0.6 * of("two choices", "chats", "prefill_tokens")
    assert of("router", "chats", "p99_s") <= of("two choices", "chats", "p99_s")


def test_chance_is_worse_than_the_router() -> None:
    assert of("random", "poisson", "mean_s") > 1.3 * of("router", "poisson", "mean_s")


def test_the_same_seed_gives_the_same_figures() -> None:
    setting = Setting(3, 0.8, "chats", 5, 30.0, entries=2)
    first, second = (World(setting, POLICIES["router"]).run() for _ in range(2))
    assert first == second


def test_an_entry_hears_of_other_nodes_late_and_of_its_own_at_once() -> None:
    """The router of an entry is not told what only the simulator knows."""
    ages: list[float] = []
    world = World(Setting(4, 0.8, "poisson", 1, 20.0, entries=2), POLICIES["router"])
    hearsay = world.listen()

    def look(now: float) -> None:
        view = hearsay.view(0, now)
        ages.extend(member.load_age_s for member in view.members.values() if not member.is_self)
        own = view.me.load.models["demo"]
        assert own.active + own.queued == world.engines[0].outstanding
        world.at(now + 0.37, lambda: look(now + 0.37))

    world.at(1.0, lambda: look(1.0))
    world.run()
    assert max(ages) > 0.5
    assert sum(ages) / len(ages) > 0.05
