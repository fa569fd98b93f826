"""Many small worlds by seed: every scenario, with and without loss, under all invariants."""

from __future__ import annotations

import pytest

from tests.simulation.run import replay_command, run

# (scenario, nodes, loss, seeds)
RUNS = [
    ("join", 2, 0.0, 6),
    ("join", 20, 0.0, 4),
    ("join", 50, 0.0, 1),
    ("join", 12, 0.3, 6),
    ("kill", 3, 0.0, 10),
    ("kill", 10, 0.0, 10),
    ("kill", 7, 0.1, 8),
    ("kill", 7, 0.2, 8),
    ("kill", 7, 0.3, 8),
    ("kill", 30, 0.1, 2),
    ("kill", 50, 0.0, 1),
    ("restart", 3, 0.0, 10),
    ("restart", 8, 0.1, 8),
    ("lost-data", 3, 0.0, 8),
    ("lost-data", 8, 0.1, 6),
    ("restart-all", 6, 0.0, 8),
    ("restart-all", 24, 0.0, 2),
    ("leave", 3, 0.0, 6),
    ("leave", 12, 0.0, 6),
    ("leave", 6, 0.3, 4),
    ("duplicate-id", 3, 0.0, 6),
    ("duplicate-id", 8, 0.1, 4),
    ("partition", 3, 0.0, 10),
    ("partition", 9, 0.0, 8),
    ("partition", 6, 0.1, 6),
    ("halves", 10, 0.0, 6),
    ("halves", 24, 0.0, 2),
    ("one-way-cut", 6, 0.0, 6),
    ("asymmetric-cut", 8, 0.0, 4),
    ("cut-pair", 5, 0.0, 6),
    ("cut-pair", 5, 0.1, 4),
    ("loss", 3, 0.3, 8),
    ("loss", 8, 0.3, 6),
    ("stall", 3, 0.0, 6),
    ("stall", 10, 0.0, 6),
    ("stalls", 10, 0.0, 1),
    ("clock-skew", 5, 0.0, 6),
    ("clock-skew", 5, 0.1, 4),
    ("drain", 12, 0.0, 6),
    ("drain", 40, 0.0, 2),
    ("mixed-versions", 6, 0.0, 6),
    ("mixed-versions", 6, 0.1, 4),
    ("upgrade", 5, 0.0, 6),
]


@pytest.mark.parametrize(
    ("scenario", "nodes", "loss", "seed"),
    [(scenario, nodes, loss, seed) for scenario, nodes, loss, seeds in RUNS for seed in range(1, seeds + 1)],
)
def test_the_mesh_keeps_its_promises(scenario: str, nodes: int, loss: float, seed: int) -> None:
    run(scenario, nodes, seed, loss)


def test_a_run_is_repeated_by_its_seed() -> None:
    assert run("kill", 5, 3, 0.1) == run("kill", 5, 3, 0.1)
    assert run("kill", 5, 3, 0.1) != run("kill", 5, 4, 0.1)


def test_a_kill_is_found_within_five_seconds_in_the_median_of_ten_nodes() -> None:
    found = sorted(run("kill", 10, seed)["detected_median_s"] for seed in range(3))
    assert found[1] <= 5.0, replay_command("kill", 10, 0)


def test_every_publication_reaches_every_peer_in_a_small_mesh() -> None:
    figures = run("fresh", 3, 1)
    assert figures["seen_share"] >= 0.99
    assert figures["gap_p95_s"] <= 1.2
    assert figures["packets_per_node_s"] <= 5.0
