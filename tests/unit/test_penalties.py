"""Penalties that are kept from token to token equal those computed anew from all tokens."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodes.engine.penalties import LogitBias, Penalties

VOCABULARY = 300

TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=400)
PENALTY = st.sampled_from([0.0, 0.7, -0.5, 2.0])


@given(
    seed=st.integers(0, 2**32),
    prompt=TOKENS,
    answer=TOKENS,
    presence=PENALTY,
    frequency=PENALTY,
    repetition=st.sampled_from([1.0, 1.3, 0.8]),
    steps=st.integers(1, 20),
)
@settings(deadline=None, max_examples=40)
def test_penalties_are_those_of_the_definition(
    seed: int, prompt: list[int], answer: list[int], presence: float, frequency: float, repetition: float, steps: int
) -> None:
    row = np.random.default_rng(seed).normal(0, 3, VOCABULARY).astype(np.float32)
    penalties = Penalties(presence, frequency, repetition, prompt)
    for index, token_id in enumerate(answer):
        penalties.count(token_id)
        if index % steps == 0:
            penalties.apply(row.copy())  # as after each token
    changed = row.copy()
    penalties.apply(changed)

    expected = row.astype(np.float64)
    for token_id in {*prompt, *answer}:
        value = expected[token_id]
        expected[token_id] = value / repetition if value > 0 else value * repetition
    for token_id, count in Counter(answer).items():
        expected[token_id] -= presence + frequency * count
    assert changed == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_tokens_that_the_row_lacks_are_left_out() -> None:
    penalties = Penalties(1.0, 0.0, 2.0, [0, 900])
    penalties.count(900)
    penalties.count(1)
    row = np.array([4.0, 4.0, 4.0], np.float32)
    penalties.apply(row)
    assert row.tolist() == [2.0, 1.0, 4.0]


def test_bias_adds_to_the_logits_of_its_tokens_alone() -> None:
    row = np.zeros(4, np.float32)
    LogitBias([(1, 2.5), (3, -100.0), (4, 9.0), (-1, 9.0)]).apply(row)
    assert row.tolist() == [0.0, 2.5, 0.0, -100.0]
