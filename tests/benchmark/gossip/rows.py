"""What the gossip benchmark prints: one JSON object a line for each measurement of each kind of agent."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable

Row = dict[str, object]


def spread(values: Iterable[float]) -> dict[str, float]:
    """How values lie; no median where there is none."""
    ordered = sorted(values)
    if not ordered:
        return {"count": 0}
    return {
        "count": len(ordered),
        "median": round(statistics.median(ordered), 3),
        "p95": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 3),
        "max": round(ordered[-1], 3),
    }


def print_row(kind: str, node_count: int, what: str, row: Row) -> None:
    print(json.dumps({"kind": kind, "n": node_count, "what": what, **row}), flush=True)
