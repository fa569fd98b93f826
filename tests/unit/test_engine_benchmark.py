"""The engine's benchmark and its soak run to their end; what they measure in so short a time means nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.benchmark.engine.rows import rate_row
from tests.benchmark.engine.workload import poisson_requests

TIMEOUT_S = 120.0


def lines_of(*arguments: str) -> list[dict[str, Any]]:
    """What `python -m ...` prints, a JSON object a line."""
    ended = subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def test_the_quick_benchmark_prints_every_row_of_both_precisions() -> None:
    rows = lines_of("tests.benchmark.engine", "--quick")
    found = {(row["precision"], row["row"]) for row in rows}
    names = {"prefill", "decode", "streams", "prefix", "outside", "lateness", "poisson", "estimate"}
    assert found == {(precision, name) for precision in ("fp32", "int4") for name in names} | {("fp32", "bandwidth")}
    assert all(row["ours"] > 0 for row in rows if row.get("unit") == "tokens/s")


def test_a_short_soak_leaves_no_slot_no_queue_entry_and_no_stream() -> None:
    (figures,) = lines_of("tests.soak.engine", "--generations", "300")
    ended = {"finished", "closed_reading", "closed_waiting", "late", "displaced", "stuck"}
    # The last request of each reader may ask for up to two further answers.
    assert 300 <= sum(figures.get(name, 0) for name in ended) <= 302
    assert figures["displaced"] > 0
    assert figures["refused"] > 0
    assert figures["prompts_found_in_cache"] > 0
    assert figures["wrong"] == []


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    row = rate_row("decode", "fp32", 8, {"ours": [10.0, 100.0, 20.0], "genai": [10.0, 50.0, 40.0]})
    assert (row["ours"], row["genai"], row["ours/genai"]) == (20.0, 40.0, 1.0)
    assert row["is_met"] is True


@pytest.mark.parametrize("seed", [1, 2])
def test_every_contestant_gets_the_same_requests_from_the_same_seed(seed: int) -> None:
    requests = poisson_requests(50, 8.0, 16, 256, seed)
    assert requests == poisson_requests(50, 8.0, 16, 256, seed)
    assert requests != poisson_requests(50, 8.0, 16, 256, seed + 1)
    assert all(16 <= request.tokens <= 256 and 16 <= len(request.prompt) <= 256 for request in requests)
    assert requests[0].at_s == 0.0
    assert 2.0 < requests[-1].at_s < 20.0
