"""Measured figures into printed rows: medians, ratios, and whether they reach what is asked of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

OURS, GENAI, LLAMA_CPP = "ours", "genai", "llama.cpp"
Figures = Mapping[str, Sequence[float]]

# Least ratios of our tokens/s to theirs, by row, precision and number of sequences.
TARGETS: dict[tuple[str, str, int | None], dict[str, float]] = {
    ("prefill", "fp32", None): {LLAMA_CPP: 1.1},
    ("decode", "fp32", 1): {GENAI: 0.95, LLAMA_CPP: 1.0},
    ("decode", "fp32", 8): {GENAI: 0.95, LLAMA_CPP: 1.15},
    ("decode", "fp32", 16): {GENAI: 0.95, LLAMA_CPP: 1.15},
    ("decode", "int4", 1): {GENAI: 0.95, LLAMA_CPP: 0.9},
    ("decode", "int4", 2): {LLAMA_CPP: 1.05},
    ("decode", "int4", 4): {LLAMA_CPP: 1.05},
    ("decode", "int4", 8): {GENAI: 0.95, LLAMA_CPP: 1.05},
    ("decode", "int4", 16): {GENAI: 0.95, LLAMA_CPP: 1.05},
    ("poisson", "fp32", None): {GENAI: 1.5},
    ("poisson", "int4", None): {GENAI: 1.5},
}
BANDWIDTH_SHARE_MIN = 0.65  # of measured bandwidth, fp32, n=1
OUTSIDE_SHARE_MAX = {1: 0.03, 16: 0.05}  # of an int4 step, by n; with top-p sampling at 16
STREAMS_RATIO_MAX = 1.6  # time of four streams over time of one
PREFIX_RATIO_MAX = 0.05  # time to first token, warm over cold
LATENESS_P99_MS_MAX = 5.0


def rate_row(row: str, precision: str, n: int | None, found: Figures) -> dict[str, Any]:
    """Tokens/s of each contestant, and ratios. found: one figure a round, by contestant, rounds in order.

    A ratio is the median of the rounds' ratios: what slows the machine down slows both of a round.
    """
    figures: dict[str, Any] = {"row": row, "precision": precision}
    if n is not None:
        figures["n"] = n
    figures |= {"unit": "tokens/s"} | {name: round(statistics.median(rates), 1) for name, rates in found.items()}
    targets = TARGETS.get((row, precision, n), {})
    is_met = []
    for peer, rates in found.items():
        if peer == OURS:
            continue
        ratio = statistics.median(ours / theirs for ours, theirs in zip(found[OURS], rates, strict=True))
        figures[f"{OURS}/{peer}"] = round(ratio, 3)
        if peer in targets:
            figures[f"target/{peer}"] = targets[peer]
            is_met.append(ratio >= targets[peer])
    if is_met:
        figures["is_met"] = all(is_met)
    return figures | {"rounds": len(found[OURS])}


def limit_row(row: str, precision: str, figures: Mapping[str, Any], value: float, limit: float) -> dict[str, Any]:
    """A figure of this engine alone, to be at most `limit`."""
    value = round(value, 4)
    return {"row": row, "precision": precision, **figures, "value": value, "limit": limit, "is_met": value <= limit}
