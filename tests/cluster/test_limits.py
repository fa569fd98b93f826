"""A small part of `python -m tests.cluster.limits`: one minute's limit over four nodes, in a partition, after restarts.

The program enters a network namespace, which a thread cannot leave, so it runs as a process."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.cluster.figures import holds
from tests.cluster.limits import least_in_a_window, most_in_a_window


def test_limits_hold_over_four_nodes_and_edits_reach_all_of_them() -> None:
    short = ["--seconds", "12", "--partition-s", "12", "--after-s", "4", "--orders", "2", "--effect-s", "20"]
    command = [sys.executable, "-m", "tests.cluster.limits", *short]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.stdout, done.stderr[-2000:]
    figures = json.loads(done.stdout)
    assert holds(figures), figures
    assert done.returncode == 0
    assert figures["orders"] == 2


def test_windows_are_of_a_minute_and_half_open() -> None:
    weights = [(0.0, 1), (30.0, 2), (59.0, 4), (60.0, 8), (90.5, 16)]
    assert most_in_a_window(weights) == 4 + 8 + 16
    assert least_in_a_window(weights) == 14
    assert least_in_a_window(weights[:2]) is None
