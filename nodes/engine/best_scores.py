"""The token with the best score of each of several rows of logits, and whether it surely is of the nucleus.

Several at once, because a call of numpy takes about as long as its work on one row. Whole rows are read once, where
nothing is known of their blocks: for a comparison with a floor, down to which tokens are looked at. Scores, noise and
how few tokens can have the best one: nodes.engine.draw.

Who wins a draw mostly lies well within the nucleus. To prove that, the tokens a little below it suffice: if they alone
are more than what top_p may leave out beside those above it, it is of the nucleus.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from nodes.engine.logit_rows import LogitRows
from nodes.engine.noise import DoubleArray, DrawsNoise, IdArray
from nodes.engine.nucleus import FloatArray, distances
from nodes.engine.sampling import SamplingParams

ROUNDING = 1e-6  # far above that of a score, in units of the temperature
# In units of the temperature: how far below the likely winner tokens are looked at for the sake of top_p, and how far
# below the peak it may be; how many they may be. Beyond, Nucleus takes less time.
_BAND = 0.5
_DEPTH = 8.0
_BAND_MAX = 2048
_NONE: IdArray = np.empty(0, np.int64)


@dataclass(slots=True)
class Best:
    """What is known of one draw before top_p is.

    token_id: that of the best score, which is no less than `least`. peak: the largest logit. near_ids: ascending, all
    whose logit is at least `floor`, or the likeliest alone; every token that can have the best score without being a
    hit is of them. is_kept: the token surely is of the nucleus.

    Where it is not: is_complete if all tokens that come before it are among near_ids. before is the mass of these, and
    of some equal ones maybe; near_mass that of all near_ids; both in units of the likeliest's."""

    token_id: int
    peak: float
    least: float
    floor: float
    near_ids: IdArray
    is_kept: bool = True
    is_complete: bool = True
    before: float = 0.0
    near_mass: float = 0.0


def find_best(
    logits: LogitRows, likeliest: SequenceOf[int], params: SequenceOf[SamplingParams], noise: DrawsNoise
) -> list[Best]:
    """Of each draw. likeliest: the lowest id of each row's largest value, which is finite."""
    rows = logits.rows
    peaks = np.array([row[token_id] for row, token_id in zip(rows, likeliest, strict=True)], np.float64)
    temperatures = np.array([each.temperature for each in params])
    hit_values = np.empty(noise.hit_ids.shape, np.float32)
    for row, ids, values in zip(rows, noise.hit_ids, hit_values, strict=True):
        row.take(ids, out=values, mode="clip")  # all are valid; other modes copy once more
    hit_scores = distances(hit_values, peaks[:, None], temperatures[:, None])
    hit_scores += noise.hit_noise
    found, best_scores = [], []
    for draw, hit in enumerate(_best_hits(hit_scores, noise.hit_ids)):
        score, own = float(hit_scores[draw, hit]), noise.own_of(draw, likeliest[draw]) - ROUNDING
        least, peak, temperature = max(score, own), float(peaks[draw]), params[draw].temperature
        # A token that is no hit reaches `least` only if it is no further from the peak than this; none does where it is
        # not positive.
        depth = noise.level + ROUNDING - least
        floor = float(np.float32(peak - temperature * depth)) if depth > 0.0 else math.inf
        winner = float(hit_values[draw, hit])
        is_band_useful = score >= own and params[draw].top_p < 1.0 and winner > peak - _DEPTH * temperature
        deeper = min(floor, float(np.float32(winner - _BAND * temperature))) if is_band_useful else floor
        floor, near_ids = _look(logits, draw, likeliest[draw], floor, deeper)
        found.append(Best(int(noise.hit_ids[draw, hit]), peak, least, floor, near_ids))
        best_scores.append(score)

    near = _near(rows, found, peaks, temperatures)
    near_scores = near.distances + noise.own(np.concatenate([best.near_ids for best in found]), near.draws)
    end = 0
    for draw, best in enumerate(found):
        start, end = end, end + len(best.near_ids)
        at = int(near_scores[start:end].argmax())
        if near_scores[start + at] > best_scores[draw]:
            best.token_id = int(best.near_ids[at])
        best.is_kept = params[draw].top_p >= 1.0 or best.token_id == likeliest[draw]
    if not all(best.is_kept for best in found):
        _weigh(rows, found, params, near)
    return found


def _best_hits(scores: DoubleArray, ids: IdArray) -> list[int]:
    """Where each row's best score is; of equal ones, which one row in a million has, that of the lowest id."""
    best = scores.argmax(axis=1)
    is_best = scores == scores[np.arange(len(scores)), best][:, None]
    if np.count_nonzero(is_best) > len(scores):
        best = np.where(is_best, ids, np.iinfo(np.int64).max).argmin(axis=1)
    return [int(at) for at in best]


def _look(logits: LogitRows, draw: int, likeliest: int, floor: float, deeper: float) -> tuple[float, IdArray]:
    """Best.floor and near_ids: down to `deeper`, or to `floor`, which suffices, where they would be many. Infinity for
    either: no token is needed."""
    ids = logits.reaching(draw, deeper) if deeper < math.inf else _NONE
    if len(ids) > _BAND_MAX and deeper < floor:
        deeper, ids = floor, ids[logits.rows[draw][ids] >= np.float32(floor)]
    return deeper, ids if len(ids) else np.array([likeliest])


@dataclass(frozen=True, slots=True)
class _Near:
    """Best.near_ids of all draws, one draw after the other: logits, distances from the peak, and whose draw it is."""

    values: FloatArray
    distances: DoubleArray
    draws: IdArray


def _near(rows: SequenceOf[FloatArray], found: list[Best], peaks: DoubleArray, temperatures: DoubleArray) -> _Near:
    lengths = [len(best.near_ids) for best in found]
    draws = np.arange(len(rows)).repeat(lengths)
    values = np.concatenate([row[best.near_ids] for row, best in zip(rows, found, strict=True)])
    return _Near(values, distances(values, peaks[draws], temperatures[draws]), draws)


def _weigh(rows: SequenceOf[FloatArray], found: list[Best], params: SequenceOf[SamplingParams], near: _Near) -> None:
    """Compare the masses before and after the best of each draw where is_kept is False."""
    values = np.array([row[best.token_id] for row, best in zip(rows, found, strict=True)])
    masses = np.exp(near.distances)
    starts = near.draws.searchsorted(np.arange(len(rows)))  # of each draw, which has one at least, as reduceat() needs
    near_masses = np.add.reduceat(masses, starts).tolist()
    masses *= near.values >= values[near.draws]
    until_itself = np.add.reduceat(masses, starts).tolist()
    for draw, best in enumerate(found):
        best.is_complete = bool(values[draw] >= best.floor)
        if best.is_complete and not best.is_kept:
            itself = math.exp((float(values[draw]) - best.peak) / params[draw].temperature)
            best.near_mass, best.before = near_masses[draw], until_itself[draw] - itself
            top_p, rest = params[draw].top_p, best.near_mass - best.before
            best.is_kept = (1.0 - top_p) * best.before < top_p * rest * (1.0 - ROUNDING)
