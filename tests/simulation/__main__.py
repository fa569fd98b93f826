"""Run scenarios and print their figures: `python -m tests.simulation --nodes 30 --seed 7 --scenario kill`."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from statistics import median

from tests.simulation.run import run
from tests.simulation.scenarios.every_scenario import SCENARIOS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--nodes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--runs", type=int, default=1, help="how many seeds from there on; figures are their medians")
    parser.add_argument("--scenario", choices=[*sorted(SCENARIOS), "all"], default="kill")
    parser.add_argument("--loss", type=float, default=0.0, help="share of datagrams lost, 0 to 1")
    options = parser.parse_args()
    failures = 0
    for scenario in sorted(SCENARIOS) if options.scenario == "all" else [options.scenario]:
        figures: dict[str, list[float]] = {}
        began = time.monotonic()
        for seed in range(options.seed, options.seed + options.runs):
            try:
                for name, value in run(scenario, options.nodes, seed, options.loss).items():
                    figures.setdefault(name, []).append(value)
            except AssertionError as exc:
                failures += 1
                print(f"FAILED {exc}", flush=True)
        head = f"{scenario} n={options.nodes}"
        for name, values in figures.items():
            print(f"{head} {name}: median {median(values):.3f} min {min(values):.3f} max {max(values):.3f}")
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{head} took {time.monotonic() - began:.1f} s of this machine, at most {peak_mib:.0f} MiB", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
