"""Chooses tokens. The same (seed, position, logits) gives the same token on every machine and in every batch.

Greedy takes the largest logit. Otherwise Gumbel-max (Gumbel 1954; Maddison et al. 2014): the token with the largest
`logit / T + g` is distributed as softmax(logits / T) when g are independent standard Gumbel variables. Here g is a hash
of (seed, position, token id): there is no generator whose state would have to travel with a sequence, and logits that
differ a little, as between CPU and GPU, change the token only where two scores nearly tie.

Only a shortlist is scored: tokens within SHORTLIST x T of the largest logit. A token outside has less than
exp(-SHORTLIST) of the most likely one's probability, so all of them together would be drawn with a probability below
vocabulary x exp(-24): 1e-6 a token at 32k, 6e-6 at 152k, and that only were all of them just outside. Between equal
scores the lowest id wins.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import numpy.typing as npt

from nodes.engine.sampling import Sampled, SamplingParams, SamplingState

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]
IdArray = npt.NDArray[np.int64]

INVALID = -1  # instead of a token: the row's largest logit is not a finite number
SHORTLIST = 24.0  # in units of the temperature; the module's docstring says what is lost
TEMPERATURE_MIN = 1e-5  # below it sampling is greedy: float32 logits are not finer than that

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15  # SplitMix64 (Steele, Lea and Flood 2014): increment and the two multipliers
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def sample(logits: FloatArray, states: SequenceOf[SamplingState]) -> list[Sampled]:
    """One token, or INVALID, per row. logits: float32 [rows, vocabulary], may be overwritten."""
    sampled = []
    for row, state in zip(logits, states, strict=True):
        best = int(row.argmax())
        peak = float(row[best])
        if not np.isfinite(peak):
            best = INVALID
        elif state.params.temperature >= TEMPERATURE_MIN:
            best = _draw(row, peak, state.params, state.position)
        sampled.append(Sampled(best))
    return sampled


def gumbel_noise(seed: int, position: int, token_ids: IdArray) -> DoubleArray:
    """Standard Gumbel variables, float64, one per id. Finite: between -3.7 and 36.8."""
    key = _mix_int(_mix_int((seed + _GAMMA) & _MASK) ^ (position & _MASK))
    bits = token_ids.astype(np.uint64)
    bits += np.uint64(1)
    bits *= np.uint64(_GAMMA)
    bits += np.uint64(key)
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(_MIX_1)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(_MIX_2)
    bits ^= bits >> np.uint64(31)
    bits >>= np.uint64(12)  # 52 bits and a half are exact in float64, so uniform is never 0 and never 1
    uniform = bits.astype(np.float64)
    uniform += 0.5
    uniform *= 2.0**-52
    np.log(uniform, out=uniform)
    np.negative(uniform, out=uniform)
    np.log(uniform, out=uniform)
    return np.negative(uniform, out=uniform)


def _draw(row: FloatArray, peak: float, options: SamplingParams, position: int) -> int:
    ids = np.flatnonzero(row >= np.float32(peak - SHORTLIST * options.temperature))
    scores = row[ids].astype(np.float64)
    scores -= peak
    scores /= options.temperature
    if options.top_p < 1.0:
        kept = _nucleus(scores, options.top_p)
        ids, scores = ids[kept], scores[kept]
    scores += gumbel_noise(options.seed, position, ids)
    return int(ids[scores.argmax()])


def _nucleus(scores: DoubleArray, top_p: float) -> IdArray:
    """Indices, ascending, of the fewest tokens whose probabilities sum to top_p (Holtzman et al. 2020)."""
    probabilities = np.exp(scores)
    probabilities /= probabilities.sum()
    # Those below (1 - top_p) / n sum to less than 1 - top_p, so the others hold the nucleus: few are left to sort.
    likely = np.flatnonzero(probabilities >= (1.0 - top_p) / len(probabilities))
    order = likely[np.argsort(-probabilities[likely], kind="stable")]
    count = int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1
    return np.sort(order[:count])


def _mix_int(value: int) -> int:
    """SplitMix64's finaliser on one integer."""
    value = ((value ^ value >> 30) * _MIX_1) & _MASK
    value = ((value ^ value >> 27) * _MIX_2) & _MASK
    return value ^ value >> 31
