"""Picks one token per row: greedy, or Gumbel-max over the top-p nucleus with counter-based noise.

argmax(logit / T + g), with g independent standard Gumbel noise, is a sample of softmax(logit / T) (Gumbel 1954; Maddison
et al. 2014). The noise is a hash of (seed, position, token id): the same request gives the same tokens on every node and
in every batch, and a small difference in the logits rarely changes a token.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nodes.engine.sequence import SamplingParams

Logits = NDArray[np.float32]

# Tokens with a logit more than this many temperatures below the best are left out before noise is drawn. Each has less
# than e^-30 = 1e-13 of the best one's probability; together, in a vocabulary of 256k, less than 3e-8.
SHORTLIST_TEMPERATURES = 30.0
TEMPERATURE_MIN = 1e-4  # below it logit / T overflows to the greedy choice anyway

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_MASK = (1 << 64) - 1


def sample(logits: Logits, params: list[SamplingParams], positions: list[int]) -> list[int]:
    """One token id per row. logits: float32 [rows, vocabulary], only read. positions: absolute position of each token.

    Ties go to the lowest id."""
    chosen: list[int] = logits.argmax(axis=-1).tolist()
    for row, (param, position) in enumerate(zip(params, positions, strict=True)):
        if param.temperature >= TEMPERATURE_MIN:
            chosen[row] = _sample_row(logits[row], param, position)
    return chosen


def _sample_row(logits: Logits, param: SamplingParams, position: int) -> int:
    best = float(logits.max())
    ids = np.flatnonzero(logits >= best - SHORTLIST_TEMPERATURES * param.temperature)
    scaled = (logits[ids].astype(np.float64) - best) / param.temperature
    if param.top_p < 1.0:
        kept = nucleus(scaled, param.top_p)
        ids, scaled = ids[kept], scaled[kept]
    return int(ids[np.argmax(scaled + gumbel(param.seed, position, ids))])


def nucleus(scaled: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """Indices, ascending, of the fewest likeliest entries whose probabilities reach top_p (Holtzman et al. 2020).

    scaled: logits over temperature, at most 0. The entry that crosses top_p belongs to it; ties go to the lowest index."""
    order = np.argsort(-scaled, kind="stable")
    cumulative = np.cumsum(np.exp(scaled[order]))
    count = int(np.searchsorted(cumulative, top_p * cumulative[-1])) + 1
    return np.sort(order[:count])


def gumbel(seed: int, position: int, token_ids: NDArray[np.intp]) -> NDArray[np.float64]:
    """Standard Gumbel noise of each token id: -log(-log(u)), u uniform in (0, 1) from 53 hashed bits."""
    key = np.uint64(_mix((_mix(seed & _MASK) + position) & _MASK))
    bits = _mix_array(key + token_ids.astype(np.uint64) * _GOLDEN)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    noise: NDArray[np.float64] = -np.log(-np.log(uniform))
    return noise


def _mix(value: int) -> int:
    """SplitMix64's step (Steele, Lea, Flood 2014)."""
    value = (value + int(_GOLDEN)) & _MASK
    value = ((value ^ (value >> 30)) * int(_MIX_1)) & _MASK
    value = ((value ^ (value >> 27)) * int(_MIX_2)) & _MASK
    return value ^ (value >> 31)


def _mix_array(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The same finaliser for many values; overflow wraps, as it should."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    mixed: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed
