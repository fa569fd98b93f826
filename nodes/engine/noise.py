"""Noise without a generator: a hash of (seed, position, token id) turned into standard Gumbel variables.

A sequence that goes on elsewhere draws the same noise, and the noise of few tokens costs no more than theirs. The noise
rises with the hash, so which tokens have noise above a bound is decided on integers, before any logarithm is taken.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

DoubleArray = npt.NDArray[np.float64]
IdArray = npt.NDArray[np.int64]
HashArray = npt.NDArray[np.uint64]

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15  # SplitMix64 (Steele, Lea and Flood 2014): increment and the two multipliers
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MIX_1_64, _MIX_2_64 = np.uint64(_MIX_1), np.uint64(_MIX_2)
_SHIFT_30, _SHIFT_27, _SHIFT_31, _SHIFT_12 = (np.uint64(bits) for bits in (30, 27, 31, 12))
_BLOCK = 32_768  # ids hashed at once: two buffers of 256 KB stay in the second-level cache
_TABLES_MAX = 8  # vocabularies in one process; 1.2 MB each at 152k
_MARGIN = 1e-6  # far above the rounding of two logarithms, so no token is lost to it


def noise_key(seed: int, position: int, choice: int = 0) -> int:
    """What seed, position and choice contribute to the hash. The lowest 64 bits of each count."""
    key = _mix((seed + _GAMMA) & _MASK)
    if choice:
        key = _mix(key ^ (choice * _MIX_1 & _MASK))
    return _mix(key ^ (position & _MASK))


@lru_cache(_TABLES_MAX)
def id_steps(vocabulary: int) -> HashArray:
    """What each token id in [0, vocabulary) contributes to the hash. Read-only."""
    steps = np.arange(1, vocabulary + 1, dtype=np.uint64)
    steps *= np.uint64(_GAMMA)
    steps.flags.writeable = False
    return steps


def gumbel_noise(key: int, steps: HashArray) -> DoubleArray:
    """Standard Gumbel variables, float64, one per id. Finite: between -3.7 and 36.8. steps: some of id_steps()."""
    bits = steps + np.uint64(key)
    _hash(bits, np.empty_like(bits))
    bits ^= bits >> _SHIFT_31
    bits >>= _SHIFT_12  # 52 bits and a half are exact in float64, so uniform is never 0 and never 1
    uniform = bits.astype(np.float64)
    uniform += 0.5
    uniform *= 2.0**-52
    np.log(uniform, out=uniform)
    np.negative(uniform, out=uniform)
    np.log(uniform, out=uniform)
    return np.negative(uniform, out=uniform)


def where_noisy(key: int, steps: HashArray, bound: float) -> IdArray:
    """Indices, ascending, into steps: all whose noise is at least `bound`, and perhaps some whose noise is less."""
    least = np.uint64(_least_hash(bound))
    key_64 = np.uint64(key)
    size = min(_BLOCK, len(steps))
    bits_buffer, shifted_buffer = np.empty(size, np.uint64), np.empty(size, np.uint64)
    found = []
    for start in range(0, len(steps), _BLOCK):
        block = steps[start : start + _BLOCK]
        bits, shifted = bits_buffer[: len(block)], shifted_buffer[: len(block)]
        np.add(block, key_64, out=bits)
        _hash(bits, shifted)
        indices = np.flatnonzero(bits >= least)
        found.append(indices + start if start else indices)
    return found[0] if len(found) == 1 else np.concatenate(found)


def _hash(bits: HashArray, shifted: HashArray) -> None:
    """SplitMix64's finaliser, in place, but for its last step, which leaves the highest 31 bits as they are."""
    np.right_shift(bits, _SHIFT_30, out=shifted)
    np.bitwise_xor(bits, shifted, out=bits)
    np.multiply(bits, _MIX_1_64, out=bits)
    np.right_shift(bits, _SHIFT_27, out=shifted)
    np.bitwise_xor(bits, shifted, out=bits)
    np.multiply(bits, _MIX_2_64, out=bits)


def _least_hash(bound: float) -> int:
    """No hash below it gives noise of `bound` or more. Only its highest 31 bits are set: those _hash() has right."""
    if bound < -4.0:  # there is no such noise
        return 0
    uniform = math.exp(-math.exp(_MARGIN - bound))
    return max(0, int(uniform * 2.0**52) - 2) >> 21 << 33


def _mix(value: int) -> int:
    """SplitMix64's finaliser on one integer."""
    value = ((value ^ value >> 30) * _MIX_1) & _MASK
    value = ((value ^ value >> 27) * _MIX_2) & _MASK
    return value ^ value >> 31
