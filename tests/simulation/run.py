"""One run of one scenario, told apart by its seed."""

from __future__ import annotations

from tests.simulation.checkers import all_checkers
from tests.simulation.scenarios import SCENARIOS, Figures
from tests.simulation.world import Network, World


def run(scenario: str, node_count: int, seed: int, loss: float = 0.0) -> Figures:
    """The scenario's figures. Raises AssertionError where an invariant or an expectation is broken."""
    world = World(seed, Network(loss=loss), all_checkers())
    return SCENARIOS[scenario](world, node_count)


def replay_command(scenario: str, node_count: int, seed: int, loss: float = 0.0) -> str:
    lossy = f" --loss {loss}" if loss else ""
    return f"python -m tests.simulation --nodes {node_count} --seed {seed} --scenario {scenario}{lossy}"
