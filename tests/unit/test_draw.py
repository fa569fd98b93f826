"""Drawing looks at few tokens; it gives what scoring and sorting all of them would."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from nodes.engine.draw import DRAWS_AT_ONCE, draw, largest
from nodes.engine.logit_rows import LogitRows
from nodes.engine.noise import DoubleArray, DrawsNoise, noise_key, noise_of
from nodes.engine.sampling import SamplingParams

FloatArray = npt.NDArray[np.float32]
IdArray = npt.NDArray[np.int64]


def naive_nucleus(scores: npt.NDArray[np.float64], is_kept: npt.NDArray[np.bool_], top_p: float) -> IdArray:
    """The fewest of those kept that reach top_p, the likeliest first."""
    order = np.argsort(-scores, kind="stable")
    order = order[is_kept[order]]
    probabilities = np.exp(scores[order])
    before = np.cumsum(probabilities / probabilities.sum())[:-1]
    assume(len(before) == 0 or float(np.abs(before - top_p).min()) > 1e-5)  # rounding may decide either way
    return order[: 1 + int((before < top_p).sum())]


def drawn(row: FloatArray, params: SamplingParams, key: int) -> int:
    return draw(LogitRows([row]), [int(row.argmax())], [params], noise_of(len(row)).of_keys([key]))[0]


def naive_draw(row: FloatArray, params: SamplingParams, key: int) -> int:
    peak = float(row.max())
    with np.errstate(over="ignore"):
        scores = (row.astype(np.float64) - peak) / params.temperature
    is_kept = np.ones(len(row), bool)
    if params.min_p > 0:
        is_kept &= scores >= np.log(params.min_p)
    if params.top_k > 0:
        is_best = np.zeros(len(row), bool)
        is_best[np.argsort(-scores, kind="stable")[: params.top_k]] = True
        is_kept &= is_best
    if params.top_p < 1:
        is_best = np.zeros(len(row), bool)
        is_best[naive_nucleus(scores, is_kept, params.top_p)] = True
        is_kept &= is_best
    scores = scores + noise_of(len(row)).all(key)
    scores[~is_kept] = -np.inf
    return int(scores.argmax())


def check(row: FloatArray, params: SamplingParams, keys: Sequence[int]) -> None:
    before = row.copy()
    for key in keys:
        assert drawn(row, params, key) == naive_draw(row, params, key)
    assert (row == before).all()


SIZES = st.sampled_from([1, 2, 50, 513, 1_500, 6_000])
SEEDS = st.integers(0, 2**32)
SPREADS = st.sampled_from([0.01, 0.5, 3.0, 8.0, 40.0])
TEMPERATURES = st.floats(0.02, 30)
KEYS = [noise_key(1, position) for position in range(3)]
LAW = settings(deadline=None, max_examples=80)


def random_row(seed: int, size: int, spread: float) -> FloatArray:
    return np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)


@given(seed=SEEDS, size=SIZES, spread=SPREADS, temperature=TEMPERATURES)
@LAW
def test_the_shortcut_to_the_best_score_finds_the_best_of_all(
    seed: int, size: int, spread: float, temperature: float
) -> None:
    check(random_row(seed, size, spread), SamplingParams(temperature=temperature), KEYS)


@given(seed=SEEDS, size=SIZES, spread=SPREADS, temperature=TEMPERATURES, top_p=st.floats(0.001, 0.9999))
@LAW
def test_top_p_draws_what_a_full_sort_would(
    seed: int, size: int, spread: float, temperature: float, top_p: float
) -> None:
    check(random_row(seed, size, spread), SamplingParams(temperature=temperature, top_p=top_p), KEYS)


@given(
    seed=SEEDS,
    size=SIZES,
    spread=SPREADS,
    temperature=TEMPERATURES,
    top_p=st.sampled_from([1.0, 0.95, 0.3]),
    top_k=st.sampled_from([0, 1, 3, 40, 1_000, 100_000]),
    min_p=st.sampled_from([0.0, 1e-6, 0.04, 0.7]),
)
@LAW
def test_every_combination_draws_what_a_full_sort_would(
    seed: int, size: int, spread: float, temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    check(random_row(seed, size, spread), params, KEYS)


@given(
    seed=SEEDS,
    size=SIZES,
    top_k=st.sampled_from([0, 1, 7, 300]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    masked=st.floats(0, 0.9),
)
@example(seed=0, size=6_000, top_k=0, top_p=1.0, masked=0.0)
@LAW
def test_equal_and_excluded_logits_change_nothing(
    seed: int, size: int, top_k: int, top_p: float, masked: float
) -> None:
    rng = np.random.default_rng(seed)
    row = rng.integers(-2, 3, size).astype(np.float32)
    row[rng.random(size) < masked] = -np.inf
    row[rng.integers(size)] = 2.0
    check(row, SamplingParams(top_k=top_k, top_p=top_p, temperature=2.0), KEYS)


@given(
    seed=SEEDS,
    size=st.sampled_from([50, 600, 6_000]),
    step=st.sampled_from([0.25, 1.0, 3.0]),
    temperature=st.floats(0.3, 3),
    share=st.floats(0, 1),
    beside=st.floats(-2e-3, 2e-3).filter(lambda beside: abs(beside) > 2e-5),
)
@LAW
def test_a_nucleus_that_ends_among_equal_or_near_tokens_ends_where_a_full_sort_says(
    seed: int, size: int, step: float, temperature: float, share: float, beside: float
) -> None:
    rng = np.random.default_rng(seed)
    row = (np.round(rng.normal(0, 3, size) / step) * step).astype(np.float32)
    masses = np.exp(np.sort((row.astype(np.float64) - row.max()) / temperature)[::-1])
    sums = (masses / masses.sum()).cumsum()
    # Of the tokens that are drawn at all one, where the nucleus nearly ends.
    last = int(sums.searchsorted(share * sums[-1]).clip(0, size - 1))
    top_p = float(np.clip(sums[last] * (1 + beside), 1e-6, 1 - 1e-6))
    check(
        row, SamplingParams(temperature=temperature, top_p=top_p), [noise_key(seed, position) for position in range(8)]
    )


def test_of_hits_with_equal_scores_the_lowest_id_wins() -> None:
    """The noise of two of this draw's hits is the same number; the higher id was hit first."""
    row = np.full(260_000, -30.0, np.float32)
    row[[90_383, 163_459]] = 0.0
    for params in (SamplingParams(), SamplingParams(top_k=2), SamplingParams(top_p=0.9)):
        assert drawn(row, params, 10525844451104858645) == 90_383


ANY_PARAMS = st.builds(
    SamplingParams,
    temperature=TEMPERATURES,
    top_p=st.sampled_from([1.0, 0.95, 0.3]),
    top_k=st.sampled_from([0, 0, 40, 1_000]),
    min_p=st.sampled_from([0.0, 0.0, 0.04]),
)


@given(seed=SEEDS, size=SIZES, spreads=st.lists(st.tuples(SPREADS, ANY_PARAMS), min_size=1, max_size=DRAWS_AT_ONCE))
@LAW
def test_a_draw_gives_the_same_token_beside_others_as_alone(
    seed: int, size: int, spreads: list[tuple[float, SamplingParams]]
) -> None:
    rows = [random_row(seed + index, size, spread) for index, (spread, _) in enumerate(spreads)]
    params = [each for _, each in spreads]
    keys = [noise_key(2, position) for position in range(len(rows))]
    likeliest = [int(row.argmax()) for row in rows]
    together = draw(LogitRows(rows), likeliest, params, noise_of(size).of_keys(keys))
    assert together == [drawn(row, each, key) for row, each, key in zip(rows, params, keys, strict=True)]


@pytest.mark.parametrize("top_p", [1.0, 0.95])
def test_equally_likely_tokens_are_not_all_scored(top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where large noise decides, of a row of any length."""
    scored = []
    own = DrawsNoise.own

    def counted(self: DrawsNoise, ids: IdArray, draws: IdArray) -> DoubleArray:
        scored.append(len(ids))
        return own(self, ids, draws)

    monkeypatch.setattr(DrawsNoise, "own", counted)
    row = np.zeros(100_000, np.float32)
    for key in KEYS:
        drawn(row, SamplingParams(top_p=top_p), key)
    assert scored == [1] * len(KEYS)


@given(seed=SEEDS, size=SIZES, spread=SPREADS, temperature=TEMPERATURES)
@LAW
def test_top_k_of_one_is_greedy(seed: int, size: int, spread: float, temperature: float) -> None:
    row = np.round(random_row(seed, size, spread))
    params = SamplingParams(temperature=temperature, top_k=1)
    assert drawn(row, params, KEYS[0]) == int(row.argmax())


@pytest.mark.parametrize(
    "params", [SamplingParams(min_p=1.0), SamplingParams(top_p=0.0), SamplingParams(top_p=1e-12)], ids=str
)
@pytest.mark.parametrize("size", [50, 6_000])
def test_the_narrowest_bounds_leave_the_likeliest_token(params: SamplingParams, size: int) -> None:
    row = random_row(3, size, 0.1)
    assert {drawn(row, params, key) for key in KEYS} == {int(row.argmax())}


def test_extreme_logits_are_compared_without_a_warning() -> None:
    row = np.full(6_000, np.finfo(np.float32).min)
    row[5_000:] = 3.0
    params = SamplingParams(temperature=1e-4, top_p=0.9)
    assert drawn(row, params, KEYS[0]) >= 5_000


@given(seed=SEEDS, size=SIZES, spread=SPREADS, count=st.integers(1, 400), unit=st.floats(0.01, 10))
@LAW
def test_the_largest_are_those_of_a_stable_sort(seed: int, size: int, spread: float, count: int, unit: float) -> None:
    row = np.round(random_row(seed, size, spread), 1)
    expected = np.sort(np.argsort(-row, kind="stable")[:count])
    assert largest(row, float(row.max()), count, unit).tolist() == expected.tolist()


def test_excluded_tokens_are_not_among_the_largest() -> None:
    row = np.array([-np.inf, 1.0, -np.inf, -500.0], np.float32)
    assert largest(row, 1.0, 3, 1.0).tolist() == [1, 3]
