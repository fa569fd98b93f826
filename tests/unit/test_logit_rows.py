"""Blocks tell of rows what reading them would."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodes.engine.logit_rows import BLOCK_LOGITS, LogitBlocks, LogitRows

FloatArray = npt.NDArray[np.float32]

LAW = settings(deadline=None, max_examples=200)
SEEDS = st.integers(0, 2**32)
COUNTS = st.integers(1, 6)
# Few distinct values make ties.
LOGITS = st.sampled_from([-math.inf, -3.0, -0.5, 0.0, 0.5, 3.0])


def blocks_of(logits: FloatArray) -> LogitBlocks:
    with np.errstate(invalid="ignore"):
        maxima = logits.reshape(len(logits), -1, BLOCK_LOGITS).max(axis=2)
        return LogitBlocks(logits, maxima, logits.sum(axis=1))


def random_logits(seed: int, rows: int, blocks: int, has_ties: bool) -> FloatArray:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (rows, blocks * BLOCK_LOGITS)).astype(np.float32)
    if has_ties:
        logits = logits.round()
        logits[rng.random(logits.shape) < 0.2] = -np.inf
    return logits


@given(seed=SEEDS, rows=COUNTS, blocks=st.integers(1, 40), has_ties=st.booleans(), floor=LOGITS | st.floats(-9, 9))
@LAW
def test_what_reaches_a_floor_is_what_a_comparison_finds(
    seed: int, rows: int, blocks: int, has_ties: bool, floor: float
) -> None:
    logits = random_logits(seed, rows, blocks, has_ties)
    known = LogitRows(list(logits), blocks_of(logits), range(rows))
    read = LogitRows(list(logits))
    for row in range(rows):
        expected = np.flatnonzero(logits[row] >= np.float32(floor)).tolist()
        assert known.reaching(row, floor).tolist() == expected
        assert read.reaching(row, floor).tolist() == expected


@given(seed=SEEDS, rows=COUNTS, blocks=st.integers(1, 40), has_ties=st.booleans(), count=st.integers(1, 60))
@LAW
def test_the_largest_are_among_those_that_are_held(
    seed: int, rows: int, blocks: int, has_ties: bool, count: int
) -> None:
    logits = random_logits(seed, rows, blocks, has_ties)
    known = LogitRows(list(logits), blocks_of(logits), range(rows))
    for row in range(rows):
        holding = known.holding(row, count)
        if holding is None:
            assert count > np.count_nonzero(logits[row].reshape(-1, BLOCK_LOGITS).max(axis=1) > -np.inf)
            continue
        order = np.argsort(-logits[row], kind="stable")[:count]
        assert set(order.tolist()) <= set(holding.tolist())
        assert holding.tolist() == sorted(holding.tolist())


@given(seed=SEEDS, rows=COUNTS, blocks=st.integers(1, 40), has_ties=st.booleans())
@LAW
def test_the_likeliest_is_the_first_of_the_largest(seed: int, rows: int, blocks: int, has_ties: bool) -> None:
    logits = random_logits(seed, rows, blocks, has_ties)
    found = blocks_of(logits)
    assert [found.likeliest(row) for row in range(rows)] == logits.argmax(axis=1).tolist()


@pytest.mark.parametrize("at", [0, BLOCK_LOGITS, 3 * BLOCK_LOGITS - 1])
def test_a_logit_that_is_no_number_is_seen_wherever_it_is(at: int) -> None:
    """Also where a graph's maximum passes over it."""
    logits = random_logits(1, 2, 3, has_ties=False)
    maxima = logits.reshape(2, -1, BLOCK_LOGITS).max(axis=2)
    logits[1, at] = np.nan
    found = LogitBlocks(logits, maxima, logits.sum(axis=1))
    assert found.likeliest(0) is not None
    assert found.likeliest(1) is None


def test_a_row_that_was_changed_is_read() -> None:
    logits = random_logits(2, 3, 4, has_ties=False)
    rows = LogitRows(list(logits), blocks_of(logits), [0, None, 2])
    rows.rows[1][5] = 99.0
    assert rows.reaching(1, 99.0).tolist() == [5]
    assert rows.holding(1, 3) is None
    changed = logits[2].copy()
    changed[7] = 99.0
    some = rows.some([0, 2], {2: changed})
    assert some.reaching(0, -math.inf).tolist() == list(range(4 * BLOCK_LOGITS))
    assert some.reaching(1, 99.0).tolist() == [7]


def test_rows_that_are_not_one_after_the_other_are_refused() -> None:
    """They would be copied, and the copy not follow the next step."""
    logits = random_logits(3, 4, 4, has_ties=False)
    with pytest.raises(AssertionError):
        LogitBlocks(logits[:, : 2 * BLOCK_LOGITS], np.zeros((4, 2), np.float32), np.zeros(4, np.float32))
