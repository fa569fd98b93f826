"""The nucleus: cheap bounds decide who is of it, and decide as the exact masses do."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nodes.engine.nucleus import Nucleus

FloatArray = npt.NDArray[np.float32]
LAW = settings(deadline=None, max_examples=80)
SEEDS = st.integers(0, 2**32)
SPREADS = st.sampled_from([0.01, 0.5, 3.0, 8.0, 200.0])
TEMPERATURES = st.floats(0.02, 30)


def row_of(seed: int, size: int, spread: float, digits: int) -> FloatArray:
    rng = np.random.default_rng(seed)
    row = np.round(rng.normal(rng.choice([-1e3, 0.0, 50.0]), spread, size), digits).astype(np.float32)
    row[rng.random(size) < rng.choice([0.0, 0.3])] = -np.inf
    row[rng.integers(size)] = row.max() if np.isfinite(row.max()) else 1.0
    return row


def masses(row: FloatArray, temperature: float) -> npt.NDArray[np.float64]:
    return np.exp((row.astype(np.float64) - float(row.max())) / temperature)


def mass_before(row: FloatArray, weights: npt.NDArray[np.float64], token_id: int) -> float:
    is_before = row > row[token_id]
    is_before[:token_id] |= row[:token_id] == row[token_id]
    return float(weights[is_before].sum())


@given(
    seed=SEEDS,
    size=st.sampled_from([1, 7, 300, 5_000]),
    spread=SPREADS,
    digits=st.sampled_from([1, 6]),
    temperature=TEMPERATURES,
    nearness=st.sampled_from([-0.5, -0.05, -0.01, -1e-3, -1e-5, 1e-5, 1e-3, 0.01, 0.05, 0.5]),
)
@LAW
def test_a_token_is_of_the_nucleus_if_those_before_it_do_not_reach_top_p(
    seed: int, size: int, spread: float, digits: int, temperature: float, nearness: float
) -> None:
    row = row_of(seed, size, spread, digits)
    weights = masses(row, temperature)
    likely = np.flatnonzero(weights > 1e-12)  # no other can win
    for token_id in likely[:: max(1, len(likely) // 8)].tolist():
        before = mass_before(row, weights, token_id)
        top_p = min(0.99999, before / float(weights.sum()) * (1.0 + nearness))
        is_in = before < top_p * float(weights.sum()) or before == 0.0
        assume(before == 0.0 or abs(before / float(weights.sum()) / top_p - 1.0) > 1e-7)
        assert Nucleus(row, float(row.max()), temperature, top_p).has(token_id) == is_in


@given(seed=SEEDS, size=st.sampled_from([1, 300, 5_000]), spread=SPREADS, temperature=TEMPERATURES)
@LAW
def test_bounds_of_masses_hold(seed: int, size: int, spread: float, temperature: float) -> None:
    row = row_of(seed, size, spread, 6)
    weights = masses(row, temperature)
    nucleus = Nucleus(row, float(row.max()), temperature, 0.9)
    assert 0.998 * weights.sum() <= nucleus.total <= 1.064 * weights.sum()
    ids = np.argsort(-row, kind="stable")[: 1 + size // 20]
    least, most = nucleus.mass_beside(ids)
    beside = float(weights.sum() - weights[ids].sum())
    assert least - 1e-12 <= beside <= most + 1e-12
    assert most - least <= 0.07 * beside + 0.004 * float(weights.sum())


@given(
    seed=SEEDS,
    size=st.sampled_from([1, 300, 5_000]),
    spread=SPREADS,
    temperature=TEMPERATURES,
    top_p=st.sampled_from([0.0, 0.2, 0.95, 0.9999]),
)
@LAW
def test_the_few_hold_all_of_the_nucleus(seed: int, size: int, spread: float, temperature: float, top_p: float) -> None:
    row = row_of(seed, size, spread, 6)
    found = Nucleus(row, float(row.max()), temperature, top_p).few(100)
    if found is None:
        return
    weights = masses(row, temperature)
    assert len(found) <= 100
    assert (np.diff(found) > 0).all()
    assert int(row.argmax()) in found
    assert float(weights[found].sum()) >= top_p * float(weights.sum()) * (1 - 1e-9)


@pytest.mark.parametrize(("spread", "is_few"), [(0.1, False), (12.0, True)])
def test_few_tokens_are_found_where_few_hold_the_nucleus(spread: float, is_few: bool) -> None:
    row = row_of(3, 20_000, spread, 6)
    assert (Nucleus(row, float(row.max()), 1.0, 0.95).few(512) is not None) == is_few
