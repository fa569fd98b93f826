"""Compare ways to choose a node: `python -m tests.simulation.routing --nodes 16 --load 0.8 --trace chats --seeds 5`.

Nodes are modelled engines (continuous batching, prefill in chunks, a prefix cache of idle slots), time is virtual. The
router is the production one, and knows of the other nodes what production gossip cores and peer links tell it; least
outstanding and two choices know the true number of requests on every node at once, which no mesh does. Figures are
medians over the seeds. Under --load 4 look at the refusals: clients come back when told.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from statistics import fmean, median, quantiles

from tests.simulation.routing.engine import Speed
from tests.simulation.routing.policies import POLICIES
from tests.simulation.routing.traces import TRACES, Trace
from tests.simulation.routing.world import Figures, Setting, World

COLUMNS = ("mean_s", "p50_s", "p99_s", "prefill_tokens", "tokens_per_s", "refusals", "retry_error", "answered")

Summary = dict[str, float | int | None]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation.routing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--nodes", type=int, action="append", help="up to 64 in reasonable time; repeatable [16]")
    parser.add_argument("--entries", type=int, default=8, help="how many of them clients ask [8]")
    parser.add_argument("--load", type=float, default=0.8, help="of what all can do without a cache [0.8]")
    parser.add_argument("--trace", choices=TRACES, action="append", help="who asks what and when; repeatable [all]")
    parser.add_argument("--seed", type=int, default=0, help="the first one; the same seed gives the same figures [0]")
    parser.add_argument("--seeds", type=int, default=1, help="how many, one after the other [1]")
    parser.add_argument("--seconds", type=float, default=240.0, help="virtual; the first quarter is not counted [240]")
    parser.add_argument("--slots", type=int, default=8, help="sequences a node decodes together [8]")
    parser.add_argument("--queue", type=int, default=16, help="requests that may wait on a node [16]")
    parser.add_argument("--speed", type=float, default=1.0, help="engines so many times as fast as two cores [1]")
    parser.add_argument("--policy", choices=POLICIES, action="append", help="only this one; repeatable")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each policy instead of a table")
    options = parser.parse_args()
    for nodes in options.nodes or [16]:
        for trace in options.trace or TRACES:
            if not options.json:
                print(f"{nodes} nodes, {options.load:.0%} load, {trace}")
                print(f"  {'policy':18}" + "".join(f"{name:>15}" for name in COLUMNS))
            settings = _settings(options, nodes, trace)
            for policy in options.policy or POLICIES:
                began = time.monotonic()
                row = medians([summary(World(setting, POLICIES[policy]).run(), setting) for setting in settings])
                if options.json:
                    about = {"nodes": nodes, "trace": trace, "policy": policy, "seeds": options.seeds}
                    print(json.dumps({**about, **row, "took_s": round(time.monotonic() - began, 1)}), flush=True)
                else:
                    print(f"  {policy:18}" + "".join(f"{_shown(row[column]):>15}" for column in COLUMNS), flush=True)
    return 0


def _settings(options: argparse.Namespace, nodes: int, trace: Trace) -> list[Setting]:
    """One for each seed."""
    speed = Speed().times(options.speed)
    entries = min(options.entries, nodes)
    return [
        Setting(nodes, options.load, trace, seed, options.seconds, entries, options.slots, options.queue, speed)
        for seed in range(options.seed, options.seed + options.seeds)
    ]


def summary(figures: Figures, setting: Setting) -> Summary:
    """mean_s, p50_s, p99_s: time to first token. retry_error: median of |told - real| / real over all refusals whose
    client got in; None without any. answered: share of the requests asked whose first token came."""
    times = figures.first_token_s
    errors = [abs(told_s - real_s) / real_s for told_s, real_s in figures.told if real_s > 0]
    return {
        "mean_s": fmean(times),
        "p50_s": median(times),
        "p99_s": quantiles(times, n=100)[98],
        "prefill_tokens": figures.prefill_tokens,
        "tokens_per_s": figures.answer_tokens / (setting.seconds - setting.counted_from),
        "refusals": figures.refusals,
        "retry_error": median(errors) if errors else None,
        "answered": len(times) / max(1, figures.asked),
    }


def medians(rows: list[Summary]) -> Summary:
    """Of each column, over what seeds gave a figure."""
    found = {column: [value for row in rows if (value := row[column]) is not None] for column in COLUMNS}
    return {column: median(values) if values else None for column, values in found.items()}


def _shown(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 1000 or value == int(value) else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(main())
