"""Run scenarios and print their figures: `python -m tests.simulation --nodes 30 --seed 7 --scenario kill`."""

from __future__ import annotations

import argparse
import sys
from statistics import median

from tests.simulation.run import replay_command, run
from tests.simulation.scenarios import SCENARIOS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--nodes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--runs", type=int, default=1, help="how many seeds from there on; figures are their medians")
    parser.add_argument("--scenario", choices=sorted(SCENARIOS), default="kill")
    parser.add_argument("--loss", type=float, default=0.0, help="share of datagrams lost, 0 to 1")
    options = parser.parse_args()
    figures: dict[str, list[float]] = {}
    failures = 0
    for seed in range(options.seed, options.seed + options.runs):
        try:
            for name, value in run(options.scenario, options.nodes, seed, options.loss).items():
                figures.setdefault(name, []).append(value)
        except AssertionError as exc:
            failures += 1
            print(f"FAILED {exc}\n{replay_command(options.scenario, options.nodes, seed, options.loss)}")
    for name, values in figures.items():
        print(f"{options.scenario} n={options.nodes} {name}: median {median(values):.3f} max {max(values):.3f}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
