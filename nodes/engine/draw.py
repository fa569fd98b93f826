"""Draws one token from each row of logits: Gumbel-max over what temperature, min_p, top_k and top_p leave.

Every draw gives the token that scoring all tokens and sorting all of them would give; what follows is only how to look
at few. Logits are float32, scores `(logit - peak) / temperature + noise` float64; between equal scores the lowest id
wins. min_p, top_k and top_p all keep a beginning of the tokens in one order: likeliest first, of equal ones lower ids.

Gumbel-max: the best score is no less than that of the likeliest token, nor of any with large noise, which are known
without looking (noise.DrawsNoise). Besides these only tokens reach it that are so near to the peak that usual noise
suffices.

top_p: the best of all tokens is the best of the nucleus if it is of it, as it mostly is. The likeliest always is, and
of others the tokens just below them often tell, else the mass of all. Where that would take too many and few tokens
hold the nucleus these are sorted, else Nucleus.has tells. If the best is not of the nucleus, the next best is asked
for, of those that come before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

import numpy as np

from nodes.engine.best_scores import ROUNDING, Best, find_best
from nodes.engine.logit_rows import LogitRows
from nodes.engine.noise import DoubleArray, DrawsNoise, IdArray, KeyNoise
from nodes.engine.nucleus import FloatArray, Nucleus, distances, exact_masses, total_mass
from nodes.engine.sampling import SamplingParams

DRAWS_AT_ONCE = 16  # whose noise, 5 KB each, stays in the first-level caches or near
_FEW = 512  # so many tokens are sorted and scored without further thought: about 30 us
_WIDER = 4.0  # by which a second look goes deeper, where no token found is of the nucleus
_BAND_WIDTHS = (4.0, 8.0, 16.0)  # below the peak, in units of the temperature: where the k largest are looked for


def draw(
    logits: LogitRows, likeliest: SequenceOf[int], params: SequenceOf[SamplingParams], noise: DrawsNoise
) -> list[int]:
    """A token id of each row, the same beside others as alone.

    likeliest: the lowest id of each row's largest value, which is finite. params: each with a positive temperature.
    noise: of as many draws, at most DRAWS_AT_ONCE."""
    rows = logits.rows
    token_ids = [0] * len(rows)
    wide: list[int] = []  # of which more than a few tokens are left
    cut: dict[int, FloatArray] = {}  # those of them that are not left whole
    for index, (row, best, each) in enumerate(zip(rows, likeliest, params, strict=True)):
        ids = _allowed(logits, index, float(row[best]), each)
        if ids is not None and len(ids) <= _FEW:
            token_ids[index] = _draw_few(row, ids, float(row[best]), each, noise.one(index))
            continue
        wide.append(index)
        if ids is not None:
            cut[index] = np.full(len(row), -np.inf, np.float32)
            cut[index][ids] = row[ids]
    if not wide:
        return token_ids
    if len(wide) < len(rows):
        noise, likeliest, params = noise.some(wide), [likeliest[index] for index in wide], [params[i] for i in wide]
    if len(wide) < len(rows) or cut:
        logits = logits.some(wide, cut)
    for index, found in enumerate(find_best(logits, likeliest, params, noise)):
        token_id = found.token_id
        if not found.is_kept:
            token_id = _draw_nucleus(logits.rows[index], params[index], found, noise.one(index))
        token_ids[wide[index]] = token_id
    return token_ids


def _allowed(logits: LogitRows, index: int, peak: float, params: SamplingParams) -> IdArray | None:
    """Ids, ascending, that top_k and min_p leave of a row; None for all of a long one."""
    row = logits.rows[index]
    ids: IdArray | None = None
    if 0 < params.top_k < len(row):
        holding = logits.holding(index, params.top_k)
        if holding is None:
            ids = largest(row, peak, params.top_k, params.temperature)
        else:
            ids = _largest_of(row, holding, params.top_k)
    if params.min_p > 0.0:
        floor = np.float32(peak + params.temperature * math.log(min(params.min_p, 1.0)))
        return logits.reaching(index, float(floor)) if ids is None else ids[row[ids] >= floor]
    return np.arange(len(row)) if ids is None and len(row) <= _FEW else ids


def largest(row: FloatArray, peak: float, count: int, unit: float) -> IdArray:
    """The ids, ascending, of the `count` largest logits; of equal ones the lowest ids. unit: a usual distance between
    large ones, which decides the speed only. Fewer ids where fewer logits are finite."""
    for width in _BAND_WIDTHS:
        is_near = row >= np.float32(peak - width * unit)
        if np.count_nonzero(is_near) >= count:
            break
    else:
        is_near = row > -np.inf
    return _largest_of(row, np.flatnonzero(is_near), count)


def _largest_of(row: FloatArray, ids: IdArray, count: int) -> IdArray:
    """largest(), where it is known to be among these ids, which are ascending."""
    if len(ids) <= count:
        return ids
    values = row[ids]
    least = np.partition(values, len(values) - count)[len(values) - count]
    above, equal = np.flatnonzero(values > least), np.flatnonzero(values == least)
    kept = np.concatenate((above, equal[: count - len(above)]))
    kept.sort()
    return ids[kept]


def _draw_few(
    row: FloatArray,
    ids: IdArray,
    peak: float,
    params: SamplingParams,
    noise: KeyNoise,
    beside: tuple[float, float] = (0.0, 0.0),
) -> int:
    """From these, ascending, which are the likeliest of the row. beside: bounds of the mass of the others, where they
    count too for what top_p is a part of."""
    values = row[ids]
    if params.top_p >= 1.0:
        last = int(ids[values == values.min()][-1])
        return _best(row, ids, distances(values, peak, params.temperature), last, peak, params, noise)
    order = np.argsort(-values, kind="stable")
    ids, depths = ids[order], distances(values[order], peak, params.temperature)
    sums = np.exp(depths).cumsum()
    certain, end = (_end(sums, params.top_p, bound) for bound in beside)
    best = _best(row, ids[:end], depths[:end], int(ids[end - 1]), peak, params, noise)
    if certain < end and _is_before(row, int(ids[certain - 1]), best):
        exact_beside = float(exact_masses(row, peak, params.temperature).sum() - sums[-1])
        end = _end(sums, params.top_p, exact_beside)
        best = _best(row, ids[:end], depths[:end], int(ids[end - 1]), peak, params, noise)
    return best


def _best(
    row: FloatArray,
    ids: IdArray,
    depths: DoubleArray,
    last: int,
    peak: float,
    params: SamplingParams,
    noise: KeyNoise,
) -> int:
    """The one with the best score of these, which are all up to `last` in the order."""
    if len(ids) == 1:
        return int(ids[0])
    scores = depths + noise.own(ids)
    hit_values, least_value = row[noise.hit_ids], row[last]
    hits = np.flatnonzero(hit_values >= least_value)
    if len(hits):
        values, hit_ids = hit_values[hits], noise.hit_ids[hits]
        hit_scores = distances(values, peak, params.temperature) + noise.hit_noise[hits]
        hit_scores[(values == least_value) & (hit_ids > last)] = -np.inf
        ids, scores = np.concatenate((ids, hit_ids)), np.concatenate((scores, hit_scores))
    return int(ids[scores == scores.max()].min())


def _end(sums: DoubleArray, top_p: float, beside: float) -> int:
    """How many tokens the nucleus has. sums: of the masses of the likeliest; beside: of all others."""
    return min(int(sums.searchsorted(top_p * (float(sums[-1]) + beside))) + 1, len(sums))


def _draw_nucleus(row: FloatArray, params: SamplingParams, best: Best, noise: KeyNoise) -> int:
    """Where the best of all is not surely of the nucleus."""
    peak = best.peak
    if best.is_complete:
        least_total, most_total = total_mass(row, peak, params.temperature)
        if best.before < params.top_p * least_total:
            return best.token_id
        # What else is of the nucleus comes before it.
        beside = max(0.0, least_total - best.near_mass), max(0.0, most_total - best.near_mass)
        return _draw_few(row, best.near_ids, peak, params, noise, beside)
    nucleus = Nucleus(row, peak, params.temperature, params.top_p)
    if (few := nucleus.few(_FEW)) is not None:
        return _draw_few(row, few, peak, params, noise, nucleus.mass_beside(few))
    least = best.least
    cut: int | None = None  # no token from this one on is of the nucleus
    while True:
        ids, scores = _reaching(row, peak, params.temperature, noise, least)
        for at in np.lexsort((ids, -scores)):
            token_id = int(ids[at])
            if cut is not None and not _is_before(row, token_id, cut):
                continue
            if nucleus.has(token_id):
                return token_id
            cut = token_id
        least -= _WIDER


def _is_before(row: FloatArray, token_id: int, other: int) -> bool:
    return bool(row[token_id] > row[other] or (row[token_id] == row[other] and token_id < other))


def _reaching(
    row: FloatArray, peak: float, temperature: float, noise: KeyNoise, least: float
) -> tuple[IdArray, DoubleArray]:
    """All ids whose score is at least `least`, in no order, and their scores. Some ids twice, then with their score and
    a lower one."""
    near = np.empty(0, np.int64)
    if least < noise.level:
        near = np.flatnonzero(row >= np.float32(peak + temperature * (least - noise.level - ROUNDING)))
    ids = np.concatenate((noise.hit_ids, near))
    own = np.concatenate((noise.hit_noise, noise.own(near)))
    scores = distances(row[ids], peak, temperature) + own
    is_reaching = scores >= least
    return ids[is_reaching], scores[is_reaching]
