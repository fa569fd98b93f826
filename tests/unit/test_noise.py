"""The noise of the sampler: a pure function that every node computes alike, independent and Gumbel distributed."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodes.engine.noise import ARRIVALS_MEAN, noise_key, noise_of

VOCABULARIES = [1, 2, 60, 3_000, 32_000]


def split_mix(value: int) -> int:
    """SplitMix64's finaliser, as its authors write it."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
    return value ^ (value >> 31)


def noises(vocabulary: int, draws: int) -> npt.NDArray[np.float64]:
    """[draws, vocabulary]"""
    return np.array([noise_of(vocabulary).all(noise_key(1, position)) for position in range(draws)])


@given(seed=st.integers(-(2**63), 2**64), position=st.integers(0, 2**20), token_id=st.integers(0, 31_999))
@settings(deadline=None)
def test_noise_is_a_pure_function_of_seed_position_and_id(seed: int, position: int, token_id: int) -> None:
    golden = 0x9E3779B97F4A7C15
    key = split_mix(split_mix((seed + golden) % 2**64) ^ position)
    assert noise_key(seed, position) == key
    until = ARRIVALS_MEAN / 32_000
    own_key = split_mix(key ^ 0xD1B54A32D192ED03)
    uniform = ((split_mix((own_key + (token_id + 1) * golden) % 2**64) >> 12) + 0.5) / 2**52
    together = noise_of(32_000).of_keys([9, key])
    drawn = together.one(1)
    own = drawn.own(np.array([5, token_id]))
    assert own[1] == pytest.approx(-math.log(until - math.log(uniform)), rel=1e-12, abs=1e-12)
    assert together.own_of(1, token_id) == pytest.approx(own[1], rel=1e-12, abs=1e-12)
    at = ((split_mix((key + golden) % 2**64) >> 12) + 0.5) / 2**52 * 32_000
    assert drawn.hit_ids[0] == int(at)
    assert drawn.hit_noise[0] == pytest.approx(-math.log(until * (at % 1 + 2**-40)), rel=1e-9)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_noise_is_gumbel_distributed(vocabulary: int) -> None:
    """Moments, and the share above bounds below, at and above the level from which on ids are hits."""
    draws = min(4_000, max(8, 60_000 // vocabulary))
    noise = noises(vocabulary, draws)
    assert np.isfinite(noise).all()
    assert abs(noise.mean() - np.euler_gamma) < 5 * 1.3 / math.sqrt(noise.size)
    assert abs(noise.var() - np.pi**2 / 6) < 5 * 3.5 / math.sqrt(noise.size)
    for bound in (-1.0, 0.0, 1.0, 2.0, 4.0, noise_of(vocabulary).level, 6.0, 8.0):
        expected = -math.expm1(-math.exp(-bound))
        assert abs(float((noise > bound).mean()) - expected) < 5 * math.sqrt(expected / noise.size) + 1e-9


@pytest.mark.parametrize("vocabulary", [2, 60, 3_000])
def test_the_largest_noise_is_of_each_id_equally_often(vocabulary: int) -> None:
    draws = 3_000
    counts = np.bincount(noises(vocabulary, draws).argmax(axis=1) * 2 // vocabulary, minlength=2)
    assert abs(int(counts[0]) - draws / 2) < 5 * math.sqrt(draws) / 2


@pytest.mark.parametrize("vocabulary", [60, 3_000])
def test_the_largest_of_all_is_as_far_up_as_that_of_independent_ones(vocabulary: int) -> None:
    largest = noises(vocabulary, 2_000).max(axis=1) - math.log(vocabulary)
    assert abs(largest.mean() - np.euler_gamma) < 5 * 1.3 / math.sqrt(len(largest))
    assert abs(largest.var() - np.pi**2 / 6) < 5 * 3.5 / math.sqrt(len(largest))


def test_noise_of_ids_and_of_positions_is_uncorrelated() -> None:
    noise = noises(60, 4_000)
    assert np.abs(np.corrcoef(noise.T) - np.eye(60)).max() < 6 / math.sqrt(4_000)
    noise = noises(3_000, 12)
    assert np.abs(np.corrcoef(noise) - np.eye(12)).max() < 6 / math.sqrt(3_000)
    high = noise > 3.0  # the upper end by itself
    assert np.abs(np.corrcoef(high) - np.eye(12)).max() < 6 / math.sqrt(3_000)


@given(key=st.integers(0, 2**64 - 1), vocabulary=st.sampled_from(VOCABULARIES))
@settings(deadline=None, max_examples=60)
def test_ids_with_noise_above_the_level_are_among_the_hits(key: int, vocabulary: int) -> None:
    noise = noise_of(vocabulary).of_keys([key]).one(0)
    ids, hits = noise.hit_ids, noise.hit_noise
    assert ((ids >= 0) & (ids < vocabulary)).all()
    assert (hits > noise.level - 1e-9).all()
    assert (noise.own(np.arange(vocabulary)) <= noise.level).all()
    everything = noise_of(vocabulary).all(key)
    assert set(np.flatnonzero(everything > noise.level).tolist()) <= set(ids.tolist())
    assert (everything[ids] >= hits).all()


def test_the_times_of_hits_are_finer_than_32_bits_of_which_the_id_takes_half() -> None:
    """So noise far above the level is drawn as often as it should be: a token of probability exp(-24) at times wins."""
    drawn = noise_of(32_000).of_keys([noise_key(7, position) for position in range(40)])
    noise = np.concatenate([drawn.one(index).hit_noise for index in range(40)])
    assert len(np.unique(noise)) == len(noise) > 30 * ARRIVALS_MEAN


def test_a_draw_has_the_same_noise_beside_others_as_alone() -> None:
    keys = [noise_key(2, position) for position in range(40)]
    together = noise_of(3_000).of_keys(keys)
    for index, key in enumerate(keys):
        beside, alone = together.one(index), noise_of(3_000).of_keys([key]).one(0)
        assert (alone.hit_ids.tolist(), alone.hit_noise.tolist()) == (
            beside.hit_ids.tolist(),
            beside.hit_noise.tolist(),
        )


def test_choices_of_one_prompt_have_noise_of_their_own() -> None:
    keys = {noise_key(seed, position, choice) for seed in range(8) for position in range(8) for choice in range(8)}
    assert len(keys) == 8**3
    noise = np.array([noise_of(20_000).all(noise_key(5, 3, choice)) for choice in range(3)])
    assert np.abs(np.corrcoef(noise) - np.eye(3)).max() < 0.03
