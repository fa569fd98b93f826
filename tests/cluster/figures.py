"""What the measuring programs have in common: laws, quantiles, what a process takes, one line of JSON at the end."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil

from tests.cluster.mesh import NodeProcess, wait_for

CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
MIB = 1024 * 1024
# After the name in parentheses of /proc/PID/stat, which may hold spaces.
STAT_USER_TICKS, STAT_SYSTEM_TICKS = 11, 12


def law(value: float | None, *, at_most: float | None = None, at_least: float | None = None) -> dict[str, Any]:
    """One bound on one figure. A law about what did not occur (None) holds."""
    holds = value is None or ((at_most is None or value <= at_most) and (at_least is None or value >= at_least))
    limit = {"at_most": at_most} if at_least is None else {"at_least": at_least}
    return {"value": None if value is None else round(value, 4), **limit, "holds": holds}


def holds(figures: dict[str, Any]) -> bool:
    return all(one["holds"] for one in figures["laws"].values())


def quantile(values: Sequence[float], share: float) -> float | None:
    """None where there are no values."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else None


def quantiles(values: Sequence[float], scale: float = 1.0) -> dict[str, Any]:
    found: dict[str, Any] = {"count": len(values)}
    for name, share in {"p50": 0.5, "p99": 0.99, "max": 1.0}.items():
        value = quantile(values, share)
        if value is not None:
            found[name] = round(value * scale, 3)
    return found


def cpu_s(node: NodeProcess) -> float:
    """CPU time that the process has used."""
    times = psutil.Process(node.pid).cpu_times()
    return float(times.user + times.system)


def main_thread_cpu_s(node: NodeProcess) -> float:
    """Of its main thread, which is trio's: all but engines and workers. Linux."""
    stat = Path(f"/proc/{node.pid}/task/{node.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(stat[STAT_USER_TICKS]) + int(stat[STAT_SYSTEM_TICKS])) / CLOCK_TICKS_PER_S


def rss_mib(nodes: Sequence[NodeProcess]) -> dict[str, float]:
    return {node.name: round(psutil.Process(node.pid).memory_info().rss / MIB, 1) for node in nodes}


def busy(node: NodeProcess) -> float:
    """Streams, slots and places in the queue that are taken at the node; more than 0 where it does not answer."""
    if not node.is_ready():
        return 1.0
    names = ("ai_cluster_engine_queue_depth", "ai_cluster_streams_open", "ai_cluster_link_streams_open")
    return node.metric("ai_cluster_engine_slots", state="active") + sum(node.metric(name) for name in names)


def free_after_s(nodes: Sequence[NodeProcess], timeout_s: float) -> tuple[float, dict[str, float]]:
    """Seconds until nothing is taken at any node; and what still is after timeout_s, by node. Blocks meanwhile."""
    started = time.monotonic()
    try:
        wait_for(lambda: all(busy(node) == 0 for node in nodes), "every slot is free", timeout_s)
    except AssertionError:
        return timeout_s, {node.name: count for node in nodes if (count := busy(node))}
    return time.monotonic() - started, {}


def progress(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def finish(figures: dict[str, Any], violations: Sequence[dict[str, Any]] = ()) -> NoReturn:
    """Print all, and exit with 1 where a law is broken."""
    for violation in violations:
        progress(json.dumps(violation))
    print(json.dumps(figures))
    sys.exit(0 if holds(figures) and not violations else 1)
