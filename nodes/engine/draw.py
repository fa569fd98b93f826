"""Draws one token from a row of logits: Gumbel-max over what temperature, min_p, top_k and top_p leave.

Every draw gives the token that scoring all tokens and sorting all of them would give; what follows is only how to look
at few. Logits are float32, scores `(logit - peak) / temperature + noise` float64; between equal scores the lowest id
wins. min_p, top_k and top_p all keep a beginning of the tokens in one order: likeliest first, of equal ones lower ids.

Gumbel-max: the best score is no less than that of the likeliest token, nor of any with large noise, which are known
without looking (noise.KeyNoise). Besides these only tokens reach it that are so near to the peak that usual noise
suffices.

top_p: the best of all tokens is the best of the nucleus if it is of it, as it mostly is. The likeliest always is, and
of others the tokens near to the peak often tell. Where they do not and few tokens hold the nucleus these are sorted,
else Nucleus.has tells. If the best is not of the nucleus, the next best is asked for, of those that come before it.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from nodes.engine.noise import DoubleArray, IdArray, KeyNoise
from nodes.engine.nucleus import Nucleus
from nodes.engine.sampling import SamplingParams

FloatArray = npt.NDArray[np.float32]

_FEW = 512  # so many tokens are sorted and scored without further thought: about 30 us
_WIDER = 4.0  # by which a second look goes deeper, where no token found is of the nucleus
_ROUNDING = 1e-6  # far above that of a score, in units of the temperature
_BAND_WIDTHS = (4.0, 8.0, 16.0)  # below the peak, in units of the temperature: where the k largest are looked for


def draw(row: FloatArray, likeliest: int, params: SamplingParams, noise: KeyNoise) -> int:
    """A token id. row: [vocabulary]. likeliest: the lowest id of its largest value, which is finite.
    params.temperature is positive."""
    peak, temperature = float(row[likeliest]), params.temperature
    ids: IdArray | None = None  # None: all of the row
    if 0 < params.top_k < len(row):
        ids = largest(row, peak, params.top_k, temperature)
    if params.min_p > 0.0:
        floor = np.float32(peak + temperature * math.log(min(params.min_p, 1.0)))
        ids = np.flatnonzero(row >= floor) if ids is None else ids[row[ids] >= floor]
    if ids is None and len(row) <= _FEW:
        ids = np.arange(len(row))
    if ids is not None:
        if len(ids) <= _FEW:
            return _draw_few(row, ids, peak, params, noise, None)
        kept = np.full(len(row), -np.inf, np.float32)
        kept[ids] = row[ids]
        row = kept
    return _draw_many(row, likeliest, peak, params, noise)


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


def _draw_few(
    row: FloatArray, ids: IdArray, peak: float, params: SamplingParams, noise: KeyNoise, nucleus: Nucleus | None
) -> int:
    """From these, ascending, which are the likeliest of the row. nucleus: of the whole row, where the others count
    too for what top_p is a part of."""
    values = row[ids]
    if params.top_p >= 1.0:
        last = int(ids[values == values.min()][-1])
        return _best(row, ids, _distances(values, peak, params.temperature), last, peak, params, noise)
    order = np.argsort(-values, kind="stable")
    ids, distances = ids[order], _distances(values[order], peak, params.temperature)
    sums = np.exp(distances).cumsum()
    least, most = (0.0, 0.0) if nucleus is None else nucleus.mass_beside(ids)
    certain, end = _end(sums, params.top_p, least), _end(sums, params.top_p, most)
    best = _best(row, ids[:end], distances[:end], int(ids[end - 1]), peak, params, noise)
    if nucleus is not None and certain < end and _is_before(row, int(ids[certain - 1]), best):
        end = _end(sums, params.top_p, float(nucleus.exact(row).sum() - sums[-1]))
        best = _best(row, ids[:end], distances[:end], int(ids[end - 1]), peak, params, noise)
    return best


def _best(
    row: FloatArray,
    ids: IdArray,
    distances: DoubleArray,
    last: int,
    peak: float,
    params: SamplingParams,
    noise: KeyNoise,
) -> int:
    """The one with the best score of these, which are all up to `last` in the order."""
    if len(ids) == 1:
        return int(ids[0])
    scores = distances + noise.own(ids)
    hit_values, least_value = row[noise.hit_ids], row[last]
    hits = np.flatnonzero(hit_values >= least_value)
    if len(hits):
        values, hit_ids = hit_values[hits], noise.hit_ids[hits]
        hit_scores = _distances(values, peak, params.temperature) + noise.hit_noise[hits]
        hit_scores[(values == least_value) & (hit_ids > last)] = -np.inf
        ids, scores = np.concatenate((ids, hit_ids)), np.concatenate((scores, hit_scores))
    return int(ids[scores == scores.max()].min())


def _end(sums: DoubleArray, top_p: float, beside: float) -> int:
    """How many tokens the nucleus has. sums: of the masses of the likeliest; beside: of all others."""
    return min(int(sums.searchsorted(top_p * (float(sums[-1]) + beside))) + 1, len(sums))


def _draw_many(row: FloatArray, likeliest: int, peak: float, params: SamplingParams, noise: KeyNoise) -> int:
    temperature, top_p = params.temperature, params.top_p
    hit_scores = _distances(row[noise.hit_ids], peak, temperature) + noise.hit_noise
    least = max(float(hit_scores.max(initial=-math.inf)), noise.own_of(likeliest) - _ROUNDING)
    ids, scores, near = _reaching(row, peak, temperature, noise, hit_scores, least)
    best = int(ids[scores == scores.max()].min())
    if top_p >= 1.0 or best == likeliest or _is_surely_kept((float(row[best]) - peak) / temperature, near, top_p):
        return best
    nucleus = Nucleus(row, peak, temperature, top_p)
    if (few := nucleus.few(_FEW)) is not None:
        return _draw_few(row, few, peak, params, noise, nucleus)
    cut: int | None = None  # no token from this one on is of the nucleus
    while True:
        for index in np.lexsort((ids, -scores)):
            token_id = int(ids[index])
            if cut is not None and not _is_before(row, token_id, cut):
                continue
            if nucleus.has(token_id):
                return token_id
            cut = token_id
        least -= _WIDER
        ids, scores, _ = _reaching(row, peak, temperature, noise, hit_scores, least)


def _is_surely_kept(distance: float, near: DoubleArray, top_p: float) -> bool:
    """A token at this distance from the peak is of the nucleus, as can be told without the tokens that are further from
    it than all of `near`, the distances of all others."""
    if len(near) == 0 or distance < near.min():
        return False
    masses = np.exp(near)
    before = float(masses[near >= distance].sum()) - math.exp(distance)  # some of the equal ones come after it
    rest = float(masses.sum()) - before
    return (1.0 - top_p) * before < top_p * rest * (1.0 - _ROUNDING)


def _is_before(row: FloatArray, token_id: int, other: int) -> bool:
    return bool(row[token_id] > row[other] or (row[token_id] == row[other] and token_id < other))


def _reaching(
    row: FloatArray, peak: float, temperature: float, noise: KeyNoise, hit_scores: DoubleArray, least: float
) -> tuple[IdArray, DoubleArray, DoubleArray]:
    """All ids whose score is at least `least`, in no order, and their scores. Some ids twice, then with their score and
    a lower one. Also the distances of all tokens so near to the peak that they can reach it without being hits.

    hit_scores: of noise.hit_ids."""
    near = np.empty(0, np.int64)
    if least < noise.level:
        near = np.flatnonzero(row >= np.float32(peak + temperature * (least - noise.level - _ROUNDING)))
    distances = _distances(row[near], peak, temperature)
    ids, scores = np.concatenate((noise.hit_ids, near)), np.concatenate((hit_scores, distances + noise.own(near)))
    is_reaching = scores >= least
    return ids[is_reaching], scores[is_reaching], distances


def _distances(values: FloatArray, peak: float, temperature: float) -> DoubleArray:
    """From the peak, in units of the temperature; float64."""
    distances = values.astype(np.float64)
    distances -= peak
    distances /= temperature
    return distances
