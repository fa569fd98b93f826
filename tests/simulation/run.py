"""One run of one scenario, told apart by its seed."""

from __future__ import annotations

from tests.simulation.checkers.every_checker import every_checker
from tests.simulation.network import Network
from tests.simulation.scenarios.every_scenario import SCENARIOS
from tests.simulation.scenarios.settled import Figures
from tests.simulation.shortcuts import rare_collections, shared_decoding
from tests.simulation.world import World


def run(scenario: str, node_count: int, seed: int, loss: float = 0.0) -> Figures:
    """The scenario's figures. Raises AssertionError where an invariant or an expectation is broken; its message ends
    with the command that runs the same again."""
    world = World(seed, Network(loss=loss), every_checker(seed, node_count))
    try:
        with shared_decoding(), rare_collections(node_count):
            return SCENARIOS[scenario](world, node_count)
    except AssertionError as exc:
        raise AssertionError(f"{exc}\nreplay: {replay_command(scenario, node_count, seed, loss)}") from exc


def replay_command(scenario: str, node_count: int, seed: int, loss: float = 0.0) -> str:
    lossy = f" --loss {loss}" if loss else ""
    return f"python -m tests.simulation --nodes {node_count} --seed {seed} --scenario {scenario}{lossy}"
