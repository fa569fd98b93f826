"""Draws one token from a row of logits: Gumbel-max over what temperature, min_p, top_k and top_p leave.

Every draw gives the token that scoring all tokens and sorting all of them would give; what follows is only how to look
at few. Logits are float32, scores `(logit - peak) / temperature + noise` float64.

Gumbel-max: a token far from the top wins only with large noise. The likeliest few are scored, and then only those
others whose noise makes up for at least the least distance that they have (noise.where_noisy).

Nucleus (top_p; Holtzman et al. 2020: the fewest tokens, likeliest first, that reach it): a sample of the row tells
about where it ends; what lies above, with a margin and checked against the row's total, is drawn from. The winner is
of the nucleus if the tokens before it do not reach top_p; else the draw is repeated among those before it.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from nodes.engine.noise import HashArray, IdArray, gumbel_noise, id_steps, where_noisy
from nodes.engine.sampling import SamplingParams

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

SHORTLIST = 24.0  # in units of the temperature; the sampler's docstring says what is lost
_FEW = 256  # so many tokens are scored at once without further thought: about 10 us
_HEAD_WIDTHS = (4.0, 2.0, 1.0)  # below the peak, in units of the temperature: where the likeliest few are looked for
_GUESS = 1.5  # the best score is that far below its median in 1 draw of 90, which then takes a second look
_BAND_WIDTHS = (4.0, 8.0, 16.0)  # likewise, where the k largest are looked for
_SPARSE_SHARE = 8  # a shortlist below an eighth of the row is gathered, a longer one costs less in place
_PROBE = 512  # logits that tell where the nucleus ends
_PROBE_SLACK = 0.2  # of the tail, kept beside the nucleus because a probe is inexact


def draw(row: FloatArray, peak: float, params: SamplingParams, key: int) -> int:
    """A token id. row: [vocabulary], its largest value `peak` finite. params.temperature is positive."""
    temperature = params.temperature
    floor = np.float32(peak - SHORTLIST * temperature)
    if params.min_p > 0.0:
        floor = max(floor, np.float32(peak + temperature * math.log(min(params.min_p, 1.0))))
    ids: IdArray | None = None  # None: all of the row
    if 0 < params.top_k < len(row):
        ids = largest(row, peak, params.top_k, temperature)
        ids = ids[row[ids] >= floor]
    else:
        is_inside = row >= floor
        if params.min_p > 0.0 or np.count_nonzero(is_inside) * _SPARSE_SHARE <= len(row):
            ids = np.flatnonzero(is_inside)
    steps = id_steps(len(row))
    values = row
    if ids is not None:
        values, steps = row[ids], steps[ids]
    if params.top_p < 1.0:
        index = _draw_nucleus(values, steps, peak, floor, params, key)
    else:
        index = _gumbel_max(values, steps, peak, floor, temperature, key)
    return index if ids is None else int(ids[index])


def largest(row: FloatArray, peak: float, count: int, unit: float) -> IdArray:
    """The ids, ascending, of the `count` largest logits; of equal ones the lowest ids. unit: a usual distance between
    large ones, which decides the speed only. Fewer ids where fewer logits are finite."""
    for width in _BAND_WIDTHS:
        is_near = row >= np.float32(peak - width * unit)
        if np.count_nonzero(is_near) >= count:
            break
    else:
        is_near = row > -np.inf
    ids = np.flatnonzero(is_near)
    if len(ids) <= count:
        return ids
    values = row[ids]
    least = np.partition(values, len(values) - count)[len(values) - count]
    above, equal = np.flatnonzero(values > least), np.flatnonzero(values == least)
    kept = np.concatenate((above, equal[: count - len(above)]))
    kept.sort()
    return ids[kept]


def _gumbel_max(
    values: FloatArray, steps: HashArray, peak: float, floor: np.float32, temperature: float, key: int
) -> int:
    """The index of the largest score among values of at least `floor`; the lowest of equal ones."""
    if len(values) <= _FEW:
        scores = _scores(values, steps, peak, floor, temperature, key)
        return int(scores.argmax())
    head, bound = _head(values, peak, temperature)
    mass = float(np.exp((values[head] - np.float32(peak)) * np.float32(1.0 / temperature)).sum())
    least = math.log(mass) - _GUESS
    while True:
        indices = np.concatenate((head, where_noisy(key, steps, least - bound)))  # some twice, to no harm
        scores = _scores(values[indices], steps[indices], peak, floor, temperature, key)
        best = float(scores.max())
        if best >= least:
            return int(indices[scores == best].min())
        least = best


def _head(values: FloatArray, peak: float, temperature: float) -> tuple[IdArray, float]:
    """Indices of some of the likeliest values, a few hundred at most, and what no other's distance from the peak, in
    units of the temperature, exceeds."""
    for width in _HEAD_WIDTHS:
        lowest = np.float32(peak - width * temperature)
        is_near = values >= lowest
        if np.count_nonzero(is_near) <= 2 * _FEW:
            return np.flatnonzero(is_near), (float(lowest) - peak) / temperature
    return np.flatnonzero(is_near)[:_FEW], 0.0


def _scores(
    values: FloatArray, steps: HashArray, peak: float, floor: np.float32, temperature: float, key: int
) -> npt.NDArray[np.float64]:
    """Minus infinity for values below `floor`."""
    scores = values.astype(np.float64)
    scores -= peak
    scores /= temperature
    scores += gumbel_noise(key, steps)
    scores[values < floor] = -np.inf
    return scores


def _draw_nucleus(
    values: FloatArray, steps: HashArray, peak: float, floor: np.float32, params: SamplingParams, key: int
) -> int:
    weights = np.subtract(values, np.float32(peak))
    if params.temperature != 1.0:
        with np.errstate(over="ignore"):  # to minus infinity, whose weight is 0
            weights *= np.float32(1.0 / params.temperature)
    np.exp(weights, out=weights)
    total = float(weights.sum())
    needed = params.top_p * total
    indices, near = _likely(weights, total, params.top_p)
    while True:
        winner = _gumbel_max(values[indices], steps[indices], peak, floor, params.temperature, key)
        is_before = near > near[winner]
        is_before[:winner] |= near[:winner] == near[winner]
        mass = float(near[is_before].sum())
        if mass < needed or mass == 0.0:
            return int(indices[winner])
        indices, near = indices[is_before], near[is_before]


def _likely(weights: FloatArray, total: float, top_p: float) -> tuple[IdArray, FloatArray]:
    """Indices, ascending, of the nucleus and of some of the tokens that follow, and their weights."""
    stride = max(1, len(weights) // _PROBE)
    probe = np.sort(weights[::stride])
    wider = min(top_p + _PROBE_SLACK * (1.0 - top_p), top_p * (1.0 + _PROBE_SLACK)) if stride > 1 else top_p
    end = int(probe.cumsum().searchsorted(np.float32((1.0 - wider) * total / stride)))
    likely = np.flatnonzero(weights >= probe[min(end, len(probe) - 1)])
    near = weights[likely]
    if float(near.sum()) >= top_p * total:
        return likely, near
    # Those below (1 - top_p) / n of the total sum to less than 1 - top_p of it, so the others hold the nucleus. The
    # total is rounded: a thousandth is more than it can be wrong.
    likely = np.flatnonzero(weights >= np.float32(0.999 * (1.0 - top_p) * total / len(weights)))
    return likely, weights[likely]
