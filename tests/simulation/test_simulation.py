"""Many small worlds by seed: every scenario, with and without loss, under all invariants."""

from __future__ import annotations

import pytest

from tests.simulation.run import replay_command, run
from tests.simulation.scenarios import fresh
from tests.simulation.world import Network, World

# (scenario, nodes, loss); each runs under two seeds.
RUNS = [
    ("join", 2, 0.0),
    ("join", 20, 0.0),
    ("join", 12, 0.3),
    ("kill", 3, 0.0),
    ("kill", 10, 0.0),
    ("kill", 7, 0.3),
    ("restart", 3, 0.0),
    ("restart", 8, 0.1),
    ("restart-all", 6, 0.0),
    ("leave", 3, 0.0),
    ("leave", 12, 0.0),
    ("partition", 3, 0.0),
    ("partition", 9, 0.0),
    ("partition", 6, 0.1),
    ("loss", 3, 0.3),
    ("loss", 8, 0.3),
    ("stall", 3, 0.0),
    ("stall", 10, 0.0),
    ("one-way-cut", 6, 0.0),
    ("drain", 12, 0.0),
]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("scenario", "nodes", "loss"), RUNS, ids=[f"{s}-{n}-{x:.0%}" for s, n, x in RUNS])
def test_the_mesh_keeps_its_promises(scenario: str, nodes: int, loss: float, seed: int) -> None:
    try:
        run(scenario, nodes, seed, loss)
    except AssertionError as exc:
        raise AssertionError(f"{exc}\nreplay: {replay_command(scenario, nodes, seed, loss)}") from exc


def test_a_run_is_repeated_by_its_seed() -> None:
    assert run("kill", 5, 3, 0.1) == run("kill", 5, 3, 0.1)
    assert run("kill", 5, 3, 0.1) != run("kill", 5, 4, 0.1)


def test_a_kill_is_found_within_five_seconds_in_the_median_of_ten_nodes() -> None:
    found = sorted(run("kill", 10, seed)["detected_median_s"] for seed in range(3))
    assert found[1] <= 5.0, replay_command("kill", 10, 0)


def test_every_publication_reaches_every_peer_in_a_small_mesh() -> None:
    figures = fresh(World(1, Network()), 3)
    assert figures["seen_share"] >= 0.99
    assert figures["gap_p95_s"] <= 1.2
    assert figures["packets_per_node_s"] <= 5.0
