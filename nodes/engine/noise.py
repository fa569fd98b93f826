"""Noise without a generator: standard Gumbel variables, one per token id, as a pure function of (seed, position).

A sequence that goes on elsewhere draws the same noise, and which of many ids have large noise is known without looking
at each. A Gumbel variable is -log(E), E exponential: the time until a thing first happens that happens once a second on
the average. So let it happen to all ids together, `vocabulary` times a second, each time to one of them at random; who
was hit first when is all there is to know. Of the beginning, until ARRIVALS_MEAN hits or so, all hits are drawn: these
are the ids whose noise is at least `level`, about ARRIVALS_MEAN of them. Who was not hit by then waits on for an
exponential time of its own, which is drawn for that id alone when somebody asks (Maddison, Tarlow and Minka 2014, "A*
Sampling", see the Gumbel process so).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence as SequenceOf
from functools import lru_cache

import numpy as np
import numpy.typing as npt

DoubleArray = npt.NDArray[np.float64]
IdArray = npt.NDArray[np.int64]
HashArray = npt.NDArray[np.uint64]

ARRIVALS_MEAN = 256  # or one for each id of a small vocabulary

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15  # SplitMix64 (Steele, Lea and Flood 2014): increment and the two multipliers
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_OWN = 0xD1B54A32D192ED03  # tells the noise of single ids from the hits
_GAMMA_64, _MIX_1_64, _MIX_2_64 = np.uint64(_GAMMA), np.uint64(_MIX_1), np.uint64(_MIX_2)
_SHIFT_30, _SHIFT_27, _SHIFT_31, _SHIFT_12 = (np.uint64(bits) for bits in (30, 27, 31, 12))
_UNIT = 2.0**-52
_LATE = 2.0**-40  # added to the time of a hit, below its resolution, so that no hit comes at 0
_VOCABULARIES_MAX = 8  # in one process


def noise_key(seed: int, position: int, choice: int = 0) -> int:
    """What seed, position and choice contribute to the hash. The lowest 64 bits of each count."""
    key = _mix((seed + _GAMMA) & _MASK)
    if choice:
        key = _mix(key ^ (choice * _MIX_1 & _MASK))
    return _mix(key ^ (position & _MASK))


class Noise:
    """The noise of a vocabulary's ids. level: ids with noise above it are among the hits. Shared and unchangeable."""

    __slots__ = ("_counts", "_steps", "_until_s", "_vocabulary", "level")

    def __init__(self, vocabulary: int) -> None:
        mean = min(ARRIVALS_MEAN, vocabulary)
        self._vocabulary = vocabulary
        self._until_s = mean / vocabulary
        self._counts = _poisson(mean)
        self._steps = _steps(np.arange(len(self._counts)))
        self.level = -math.log(self._until_s)

    def of_keys(self, keys: SequenceOf[int]) -> DrawsNoise:
        """The noise of these draws, at least one. A few together cost little more than one."""
        counts = [bisect_left(self._counts, (_mix(key ^ _MIX_2) >> 11) * 2.0**-53) for key in keys]
        most = max(1, *counts)
        # An id and a time at once: the number's integer part and, of no less than 34 bits, what follows.
        at = _uniform(self._steps[:most] + np.array(keys, np.uint64)[:, None])
        at *= self._vocabulary
        ids = at.astype(np.int64)
        np.minimum(ids, self._vocabulary - 1, out=ids)  # the product may be rounded up
        at -= ids
        at += _LATE
        at *= self._until_s
        np.log(at, out=at)
        np.negative(at, out=at)
        for noise, count in zip(at, counts, strict=True):
            noise[count:] = -np.inf
        return DrawsNoise(self.level, self._until_s, keys, ids, at)

    def all(self, key: int) -> DoubleArray:
        """Of every id: what the others give in parts."""
        drawn = self.of_keys([key]).one(0)
        noise = drawn.own(np.arange(self._vocabulary))
        np.maximum.at(noise, drawn.hit_ids, drawn.hit_noise)
        return noise


class DrawsNoise:
    """The noise of several draws. hit_ids, hit_noise: [draws, most hits], of each what KeyNoise has; after the last hit
    of a draw its noise is minus infinity, and the ids mean nothing."""

    __slots__ = ("_keys", "_own_keys", "_until_s", "hit_ids", "hit_noise", "level")

    def __init__(
        self, level: float, until_s: float, keys: SequenceOf[int], hit_ids: IdArray, hit_noise: DoubleArray
    ) -> None:
        self.level = level
        self.hit_ids = hit_ids
        self.hit_noise = hit_noise
        self._until_s = until_s
        self._keys = keys
        self._own_keys = np.array([_mix(key ^ _OWN) for key in keys], np.uint64)

    def one(self, draw: int) -> KeyNoise:
        """That of one of them, counted from 0."""
        is_hit = self.hit_noise[draw] > -np.inf
        ids, noise = self.hit_ids[draw][is_hit], self.hit_noise[draw][is_hit]
        return KeyNoise(self.level, self._until_s, self._keys[draw], ids, noise)

    def some(self, draws: SequenceOf[int]) -> DrawsNoise:
        """That of these, counted from 0."""
        keys = [self._keys[draw] for draw in draws]
        return DrawsNoise(self.level, self._until_s, keys, self.hit_ids[draws], self.hit_noise[draws])

    def own(self, ids: IdArray, draws: IdArray) -> DoubleArray:
        """KeyNoise.own() of ids[i] in the draw draws[i]."""
        return _own_noise(_steps(ids) + self._own_keys[draws], self._until_s)

    def own_of(self, draw: int, token_id: int) -> float:
        """own() of one id, but for rounding, in a fifth of the time."""
        bits = _mix((token_id + 1) * _GAMMA + int(self._own_keys[draw]) & _MASK)
        return -math.log(self._until_s - math.log(((bits >> 12) + 0.5) * _UNIT))


class KeyNoise:
    """The noise of one draw, whose noise_key is `key`. hit_ids: in no order, some of them twice, with hit_noise, at
    least `level`, for each; of those of one id the largest counts."""

    __slots__ = ("_until_s", "hit_ids", "hit_noise", "key", "level")

    def __init__(self, level: float, until_s: float, key: int, hit_ids: IdArray, hit_noise: DoubleArray) -> None:
        self.level = level
        self._until_s = until_s
        self.key = key
        self.hit_ids = hit_ids
        self.hit_noise = hit_noise

    def own(self, ids: IdArray) -> DoubleArray:
        """The noise of these ids where they are not among the hits: below `level`, so a hit's is the larger one."""
        return _own_noise(_steps(ids) + np.uint64(_mix(self.key ^ _OWN)), self._until_s)


@lru_cache(_VOCABULARIES_MAX)
def noise_of(vocabulary: int) -> Noise:
    """That of ids in [0, vocabulary)."""
    return Noise(vocabulary)


def _poisson(mean: int) -> list[float]:
    """Probabilities that a Poisson variable is at most 0, 1, 2 ... until nothing is left that 53 bits could tell."""
    deviations = 9 * math.sqrt(mean) + 40
    terms = (math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(int(mean + deviations)))
    sums, total = [], 0.0
    for term in terms:
        total += term
        sums.append(total)
    return sums


def _steps(numbers: IdArray) -> HashArray:
    """What each number contributes to a hash."""
    steps = numbers.astype(np.uint64)
    steps += np.uint64(1)
    steps *= _GAMMA_64
    return steps


def _uniform(bits: HashArray) -> DoubleArray:
    """Hash these, which are overwritten, into (0, 1): 52 bits and a half, so neither bound is reached."""
    bits ^= bits >> _SHIFT_30
    bits *= _MIX_1_64
    bits ^= bits >> _SHIFT_27
    bits *= _MIX_2_64
    bits ^= bits >> _SHIFT_31
    bits >>= _SHIFT_12
    uniform = bits.astype(np.float64)
    uniform += 0.5
    uniform *= _UNIT
    return uniform


def _own_noise(bits: HashArray, until_s: float) -> DoubleArray:
    """bits: overwritten."""
    wait = _uniform(bits)
    np.log(wait, out=wait)
    np.subtract(until_s, wait, out=wait)
    np.log(wait, out=wait)
    return np.negative(wait, out=wait)


def _mix(value: int) -> int:
    """SplitMix64's finaliser on one integer."""
    value = ((value ^ value >> 30) * _MIX_1) & _MASK
    value = ((value ^ value >> 27) * _MIX_2) & _MASK
    return value ^ value >> 31
