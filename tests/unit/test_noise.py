"""The noise of the sampler: a pure function that every node computes alike, and Gumbel distributed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodes.engine.noise import gumbel_noise, id_steps, noise_key, where_noisy


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
    steps = id_steps(2**18 + 1)
    noise = gumbel_noise(noise_key(seed, position), steps[[token_id, 5]])
    assert noise[0] == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert noise[1] == gumbel_noise(noise_key(seed, position, 0), steps[5:6])[0]


def test_noise_is_gumbel_distributed() -> None:
    noise = gumbel_noise(noise_key(1, 0), id_steps(200_000))
    assert np.isfinite(noise).all()
    assert abs(noise.mean() - np.euler_gamma) < 0.02
    assert abs(noise.var() - np.pi**2 / 6) < 0.03


@given(
    key=st.integers(0, 2**64 - 1),
    bound=st.one_of(st.floats(-6, 40), st.sampled_from([-math.inf, -4.0, 0.0, 36.7, math.inf])),
    size=st.sampled_from([1, 100, 32_768, 40_000]),
)
@settings(deadline=None, max_examples=40)
def test_no_token_whose_noise_reaches_the_bound_is_missed(key: int, bound: float, size: int) -> None:
    noise = gumbel_noise(key, id_steps(size))
    found = where_noisy(key, id_steps(size), bound)
    assert set(np.flatnonzero(noise >= bound).tolist()) <= set(found.tolist())
    assert (np.diff(found) > 0).all()
    assert (noise[found] >= bound - 0.01).all() or bound > 20  # few others are looked at


@pytest.mark.parametrize("bound_of", [lambda noise: noise, lambda noise: np.nextafter(noise, -np.inf)])
def test_a_token_at_the_bound_is_found(bound_of: object) -> None:
    key, steps = noise_key(3, 9), id_steps(1_000)
    for index, noise in enumerate(gumbel_noise(key, steps)):
        assert index in where_noisy(key, steps[: index + 1], bound_of(noise))  # type: ignore[operator]


def test_choices_of_one_prompt_have_noise_of_their_own() -> None:
    keys = {noise_key(seed, position, choice) for seed in range(8) for position in range(8) for choice in range(8)}
    assert len(keys) == 8**3
    noise = np.array([gumbel_noise(noise_key(5, 3, choice), id_steps(20_000)) for choice in range(3)])
    assert np.abs(np.corrcoef(noise) - np.eye(3)).max() < 0.03


def test_steps_are_shared_and_cannot_be_written() -> None:
    assert id_steps(77) is id_steps(77)
    with pytest.raises(ValueError, match="read-only"):
        id_steps(77)[0] = 1
