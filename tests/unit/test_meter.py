"""What an engine expects of the next answers, from those it has seen."""

from __future__ import annotations

import pytest

from nodes.engine.meter import ANSWER_TOKENS_DEFAULT, Meter


@pytest.mark.parametrize(
    ("answers", "expected"),
    [([], ANSWER_TOKENS_DEFAULT), ([40], 40), ([40, 60], 50), ([40] * 16 + [360], 60), ([40] * 200 + [360], 60)],
)
def test_the_first_answers_count_alike_and_later_ones_a_sixteenth(answers: list[int], expected: float) -> None:
    meter = Meter()
    for tokens in answers:
        meter.answered(tokens)
    assert meter.answer_tokens == pytest.approx(expected)
