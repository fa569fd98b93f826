"""Tokens from logits: the distribution they should have, and that the same arguments give the same token."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodes.engine import sampler
from nodes.engine.sampler import INVALID, SHORTLIST, gumbel_noise
from nodes.engine.sampling import SamplingParams, SamplingState

VOCABULARY = 50


def sample(logits: npt.NDArray[np.float32], params: Sequence[SamplingParams], positions: Iterable[int]) -> list[int]:
    """The tokens chosen for rows at these positions of otherwise empty answers."""
    states = [SamplingState(p, range(position), frozenset()) for p, position in zip(params, positions, strict=True)]
    return [sampled.token_id for sampled in sampler.sample(logits, states)]


DRAWS = 20_000
# The 1 - 1e-6 quantile of chi-square with few degrees of freedom: the seeds are fixed, so this never flickers.
CHI_SQUARE_MAX = {5: 38.3, 9: 45.1, 19: 63.0}


def logits_of(probabilities: list[float]) -> npt.NDArray[np.float32]:
    return np.log(np.array(probabilities, np.float64)).astype(np.float32)


def draw(row: npt.NDArray[np.float32], count: int, **params: float) -> npt.NDArray[np.int64]:
    """How often each token is drawn over `count` positions of one seed."""
    options = SamplingParams(seed=11, **params)  # type: ignore[arg-type]
    tokens = sample(np.tile(row, (count, 1)), [options] * count, range(count))
    return np.bincount(tokens, minlength=len(row))


def chi_square(counts: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float64]) -> float:
    expected = counts.sum() * probabilities
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_tokens_are_distributed_as_the_softmax(temperature: float) -> None:
    row = np.random.default_rng(3).normal(0, 1, 20).astype(np.float32)
    expected = np.exp(row.astype(np.float64) / temperature)
    assert chi_square(draw(row, DRAWS, temperature=temperature), expected / expected.sum()) < CHI_SQUARE_MAX[19]


def test_seeds_draw_independently_of_each_other() -> None:
    row = logits_of([0.1] * 10)
    seeds = [SamplingParams(seed=seed) for seed in range(DRAWS)]
    tokens = sample(np.tile(row, (DRAWS, 1)), seeds, [7] * DRAWS)
    assert chi_square(np.bincount(tokens, minlength=10), np.full(10, 0.1)) < CHI_SQUARE_MAX[9]
    pairs = np.bincount([(a * 10 + b) % 20 for a, b in itertools.pairwise(tokens)], minlength=20)
    assert chi_square(pairs, np.full(20, 0.05)) < CHI_SQUARE_MAX[19]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.3, [1]), (0.4, [1]), (0.41, [1, 3]), (0.7, [1, 3]), (0.85, [0, 1, 3]), (0.999, [0, 1, 2, 3, 4])],
)
def test_top_p_draws_from_the_fewest_tokens_that_reach_it(top_p: float, kept: list[int]) -> None:
    row = logits_of([0.15, 0.4, 0.1, 0.3, 0.05])
    counts = draw(row, 2_000, temperature=1.0, top_p=top_p - 1e-4)
    assert np.flatnonzero(counts).tolist() == kept


def test_top_p_keeps_the_proportions_of_what_it_keeps() -> None:
    row = logits_of([0.05, 0.25, 0.2, 0.15, 0.12, 0.1, 0.03, 0.1])
    counts = draw(row, DRAWS, temperature=1.0, top_p=0.9)
    kept = np.array([0.25, 0.2, 0.15, 0.12, 0.1, 0.1])
    assert chi_square(counts[[1, 2, 3, 4, 5, 7]], kept / kept.sum()) < CHI_SQUARE_MAX[5]
    assert counts[[0, 6]].tolist() == [0, 0]


@given(seed=st.integers(0, 2**32), top_p=st.floats(0.01, 0.999))
def test_the_nucleus_is_that_of_a_full_sort(seed: int, top_p: float) -> None:
    row = np.random.default_rng(seed).normal(0, 2, VOCABULARY).astype(np.float32)
    probabilities = np.exp(row.astype(np.float64))
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)
    nucleus = set(order[: int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1].tolist())
    options = [SamplingParams(seed=seed, top_p=top_p)] * 40
    drawn = sample(np.tile(row, (40, 1)), options, range(40))
    assert set(drawn) <= nucleus


@given(seed=st.integers(0, 2**32), temperature=st.floats(0.05, 2.0))
def test_what_is_left_off_the_shortlist_could_not_have_won(seed: int, temperature: float) -> None:
    row = np.random.default_rng(seed).normal(0, 12, VOCABULARY).astype(np.float32)
    scores = row.astype(np.float64) / temperature + gumbel_noise(seed, 3, np.arange(VOCABULARY))
    assert sample(row[None], [SamplingParams(seed=seed, temperature=temperature)], [3]) == [int(scores.argmax())]


def test_a_token_is_the_same_in_every_batch_and_on_every_machine() -> None:
    rows = np.random.default_rng(5).normal(0, 2, (6, VOCABULARY)).astype(np.float32)
    params = [SamplingParams(seed=-3 + i, top_p=0.5 + i / 10) for i in range(6)]
    together = sample(rows, params, range(100, 106))
    assert together == [sample(rows[i : i + 1], [params[i]], [100 + i])[0] for i in range(6)]
    assert together == [13, 8, 46, 35, 20, 19]  # nodes of two versions must agree, or a failover changes the text


def split_mix(value: int) -> int:
    """SplitMix64's finaliser, as its authors write it."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
    return value ^ (value >> 31)


@given(seed=st.integers(-(2**63), 2**64), position=st.integers(0, 2**20), token_id=st.integers(0, 2**18))
def test_noise_is_a_pure_function_of_seed_position_and_id(seed: int, position: int, token_id: int) -> None:
    golden = 0x9E3779B97F4A7C15
    key = split_mix(split_mix((seed + golden) % 2**64) ^ position)
    uniform = ((split_mix((key + (token_id + 1) * golden) % 2**64) >> 12) + 0.5) / 2**52
    expected = -math.log(-math.log(uniform))
    noise = gumbel_noise(seed, position, np.array([token_id, 5]))
    assert noise[0] == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert noise[1] == gumbel_noise(seed, position, np.array([5]))[0]


def test_noise_is_gumbel_distributed() -> None:
    noise = gumbel_noise(1, 0, np.arange(200_000))
    assert np.isfinite(noise).all()
    assert abs(noise.mean() - np.euler_gamma) < 0.02
    assert abs(noise.var() - np.pi**2 / 6) < 0.03


@pytest.mark.parametrize(
    ("params", "row", "token"),
    [
        (SamplingParams(temperature=0), [1, 3, 2], 1),
        (SamplingParams(temperature=0), [1, 3, 3], 1),
        (SamplingParams(temperature=1e-9), [1, 3, 2.99], 1),
        (SamplingParams(temperature=0), [-np.inf, -5, -np.inf], 1),
        (SamplingParams(), [-np.inf, -5, -np.inf], 1),
        (SamplingParams(top_p=1e-9), [1, 3, 2.9], 1),
        (SamplingParams(temperature=0), [1, np.nan, 2], INVALID),
        (SamplingParams(), [np.nan] * 3, INVALID),
        (SamplingParams(), [1, np.inf, 2], INVALID),
        (SamplingParams(), [-np.inf] * 3, INVALID),
    ],
    ids=[
        "greedy",
        "lowest id of a tie",
        "tiny temperature is greedy",
        "greedy over masked logits",
        "sampled over masked logits",
        "tiny top_p is greedy",
        "one nan",
        "all nan",
        "infinite",
        "all masked",
    ],
)
def test_special_rows(params: SamplingParams, row: list[float], token: int) -> None:
    assert sample(np.array([row], np.float32), [params], [0]) == [token]


def test_the_shortlist_scales_with_the_temperature() -> None:
    """At a high temperature a token far below the best one has its share."""
    row = np.array([0.0, -SHORTLIST * 1.5], np.float32)
    counts = draw(row, 2_000, temperature=20.0)
    assert counts[1] > 200


def test_sampling_leaves_the_logits_as_they_are() -> None:
    rows = np.random.default_rng(1).normal(0, 2, (2, VOCABULARY)).astype(np.float32)
    before = rows.copy()
    sample(rows, [SamplingParams(top_p=0.9), SamplingParams(temperature=0)], [1, 2])
    assert (rows == before).all()
