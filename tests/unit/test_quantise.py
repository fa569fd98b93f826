"""Four-bit weights."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodes.model_tools.quantise import BLOCK_SIZES, ZERO_POINT, quantise_int4


def dequantise_int4(
    nibbles: npt.NDArray[np.uint8], scales: npt.NDArray[np.float32], inputs: int
) -> npt.NDArray[np.float32]:
    """The weights, float32 [outputs, inputs], that a matrix of quantise_int4 stands for."""
    outputs, blocks, half = nibbles.shape
    codes = np.empty((outputs, blocks, 2 * half), np.float32)
    codes[..., 0::2] = nibbles & 0xF
    codes[..., 1::2] = nibbles >> 4
    weights: npt.NDArray[np.float32] = (codes - np.float32(ZERO_POINT)) * scales[..., None]
    return weights.reshape(outputs, -1)[:, :inputs]


@given(
    seed=st.integers(0, 999), outputs=st.integers(1, 5), inputs=st.integers(1, 300), size=st.sampled_from(BLOCK_SIZES)
)
def test_no_weight_moves_by_more_than_half_a_step_unless_it_is_opposite_the_largest(
    seed: int, outputs: int, inputs: int, size: int
) -> None:
    weight = np.random.default_rng(seed).standard_normal((outputs, inputs), np.float32)
    nibbles, scales = quantise_int4(weight, size)
    steps = np.repeat(np.abs(scales), size, axis=1)[:, :inputs]
    moved = np.abs(dequantise_int4(nibbles, scales, inputs) - weight) / steps
    # The range is -8 to 7 steps, so a weight almost as large as the largest and of the other sign is cut to 7.
    assert moved.max() <= 1.001
    assert moved[np.abs(weight) <= 7.5 * steps].max(initial=0) <= 0.501


def test_the_largest_weight_of_a_block_and_zero_are_kept_exactly() -> None:
    weight = np.zeros((2, 40), np.float32)
    weight[0, :3] = [0.5, -2.0, 1.0]
    nibbles, scales = quantise_int4(weight, 32)
    assert nibbles.shape == (2, 2, 16)
    assert scales.tolist() == [[0.25, 0], [0, 0]]
    np.testing.assert_array_equal(dequantise_int4(nibbles, scales, 40), weight)
    assert nibbles[0, 0, :2].tolist() == [10 | 0 << 4, 12 | 8 << 4], "the earlier weight is in the low half"


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_a_matrix_in_pieces_is_quantised_as_in_one(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    weight = np.random.default_rng(1).standard_normal((7, 130), np.float32)
    whole = quantise_int4(weight, size)
    monkeypatch.setattr("nodes.model_tools.quantise.CHUNK_WEIGHTS", 260)
    for piece, expected in zip(quantise_int4(weight, size), whole, strict=True):
        np.testing.assert_array_equal(piece, expected)
