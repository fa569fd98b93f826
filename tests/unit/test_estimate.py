"""The estimate of the time to first token, by cases whose answer is plain arithmetic."""

from __future__ import annotations

import pytest

from nodes.engine.estimate import estimate_first_token

STEP_S = 0.1
RATE = 640.0  # a chunk of 64 tokens takes one step's time


@pytest.mark.parametrize(
    ("remaining", "queued", "queued_tokens", "prompt", "expected"),
    [
        ([], 0, 0, 640, 1.0),
        ([], 0, 640, 640, 2.0),
        ([10, 10], 0, 0, 640, 0.05 + 2.0),
        ([10, 20, 30, 40], 0, 0, 64, 0.05 + 1.0 + 0.2),
        ([10, 20, 30, 40], 2, 64, 64, 0.05 + 3.0 + 0.1 + 0.2),
        ([10, 20, 30, 40], 5, 64, 64, 0.05 + 2.0 + 10.0 + 0.1 + 0.2),
        ([10, 20, 30, 40], 2, 6_400, 64, 0.05 + 20.0 + 0.2),
        ([10], 3, 0, 64, 0.05 + 1.0 + 0.2),
        ([50], 4, 0, 64, 0.05 + 10.0 + 0.2),
    ],
    ids=[
        "idle",
        "behind a prompt",
        "beside others",
        "no slot",
        "third in line",
        "second round",
        "long prompts ahead",
        "burst",
        "behind a burst",
    ],
)
def test_the_estimate_adds_up(
    remaining: list[float], queued: int, queued_tokens: int, prompt: int, expected: float
) -> None:
    estimate = estimate_first_token(
        prefill_rate=RATE,
        step_s=STEP_S,
        answer_tokens=100,
        slots=4,
        queued=queued,
        queued_tokens=queued_tokens,
        remaining_tokens=remaining,
    )
    assert estimate.seconds(prompt) == pytest.approx(expected)


def test_nothing_measured_yet_gives_a_finite_estimate() -> None:
    estimate = estimate_first_token(
        prefill_rate=0, step_s=0, answer_tokens=256, slots=1, queued=3, queued_tokens=99, remaining_tokens=[7]
    )
    assert 0 < estimate.seconds(100) < 60
