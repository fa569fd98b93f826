"""Who is of the nucleus (top_p; Holtzman et al. 2020): the fewest tokens, likeliest first, that together reach it.

A token is of it if the tokens before it do not reach top_p; of equal ones those with lower ids come before. Their mass
is compared with that of all others, itself included. Weights are exp() to within 6 %, for a third of its time; they
bound both masses. Near the end of the nucleus the two are so unequal, unless top_p is small, that these bounds decide
all but one in a hundred cases, for which the masses are computed in float64.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IdArray = npt.NDArray[np.int64]

_DEPTH = 83.0  # below the peak, in units of the temperature: weights down to there are told apart, exp(-83) of 1
_PEAK_MAX = 1e6  # times the temperature: for a larger one float32 is too coarse to shift a row by it
# A weight is between its true value and 1.0615 of it: 2^x is taken for (1 + x) between integers, whose ratio is largest
# at x = 1/ln(2) - 1. Roundings are below 1e-4 of it.
_EXCESS_MAX = 1.0616
_ROUNDING = 1e-4
# Of the total, that einsum's sum in float32 may be wrong by: ten times the most of 260,000 terms that were made for it.
_SUM_ERROR = 1.2e-3
_EXPONENT_ONE = 1 << 23  # float32 bits: one more in the exponent
_EXPONENT_BIAS = 127
_PARTS = 4  # a quarter decides about three draws of four at a top_p of 0.95
_PROBED_TOP_P_MAX = 0.8  # above it the nucleus of a row that is not peaked has too many tokens
_PROBE_SLACK = 0.1  # of the total, kept beside the guessed nucleus because a probe is inexact
_PROBE = 512  # logits that tell whether the nucleus is small
_TAIL_SHARE = 0.8  # of what may be left out of the nucleus; the rest is far more than the total can be wrong


class Nucleus:
    """Of one row of logits. All masses are in units of the likeliest token's."""

    __slots__ = ("_peak", "_row", "_temperature", "_top_p", "_unit", "_weights", "total")

    def __init__(self, row: FloatArray, peak: float, temperature: float, top_p: float) -> None:
        """row: [vocabulary], its largest value `peak` finite; kept. total: of all tokens, to within 7 %."""
        self._row, self._peak, self._temperature, self._top_p = row, peak, temperature, top_p
        self._weights, self._unit = _weights(row, peak, temperature)
        self.total = _sum(self._weights) * self._unit

    def few(self, limit: int) -> IdArray | None:
        """Ids, ascending, that hold all of the nucleus; None where none were found, or these are more than `limit`."""
        weights, top_p = self._weights, self._top_p
        # Those below this weight are too little, all together, to be missed.
        left = _TAIL_SHARE / _EXCESS_MAX * max(1.0 - top_p, 0.0) * self.total
        least = np.float32(left / (self._unit * len(weights)))
        probe = weights[:: max(1, len(weights) // _PROBE)]
        if np.count_nonzero(probe >= least) * len(weights) <= 2 * limit * len(probe):
            ids = np.flatnonzero(weights >= least)
            return ids if len(ids) <= limit else None
        if top_p > _PROBED_TOP_P_MAX:
            return None
        # What lies above some weight is a guess, from the probe, and holds the nucleus or not.
        probe = np.sort(probe)
        outside = (1.0 - top_p - _PROBE_SLACK) * self.total / self._unit * len(probe) / len(weights)
        end = min(int(probe.cumsum().searchsorted(np.float32(outside))), len(probe) - 1)
        if (len(probe) - end) * len(weights) > 2 * limit * len(probe):
            return None
        ids = np.flatnonzero(weights >= probe[end])
        least_mass, most_beside = float(weights[ids].sum()) * self._unit, self.mass_beside(ids)[1]
        if len(ids) > limit or (1.0 - top_p) * least_mass <= top_p * most_beside * (1.0 + _ROUNDING) * _EXCESS_MAX:
            return None
        return ids

    def mass_beside(self, ids: IdArray) -> tuple[float, float]:
        """Bounds of the mass of all tokens but these."""
        rest = self.total - _sum(self._weights[ids]) * self._unit
        error = _SUM_ERROR * self.total
        return max(0.0, rest - error) / _EXCESS_MAX * (1.0 - _ROUNDING), max(0.0, rest + error) * (1.0 + _ROUNDING)

    def has(self, token_id: int) -> bool:
        """The token is of the nucleus."""
        row, value, total, top_p = self._row, self._row[token_id], self.total, self._top_p
        error = _SUM_ERROR * total
        # A part of the row may hold enough of what does not come before.
        part = len(row) // _PARTS
        rest = self._mass(row[:part] < value, self._weights[:part])
        if self._is_certain(total - rest, rest, error):
            return True
        is_above = row > value
        equal = int(np.count_nonzero(row[:token_id] == value))
        if value == self._peak and not equal:
            return True
        before = self._mass(is_above, self._weights) + equal * float(self._weights[token_id]) * self._unit
        if self._is_certain(before, total - before, error):
            return True
        odds = top_p * (1.0 + _ROUNDING), (1.0 - top_p) * (1.0 - _ROUNDING)
        if odds[0] * (total - before + error) * _EXCESS_MAX <= odds[1] * (before - error):
            return False
        is_above[:token_id] |= row[:token_id] == value
        weights = exact_masses(row, self._peak, self._temperature)
        before = float(weights[is_above].sum())
        return before < top_p * float(weights.sum()) or before == 0.0

    def _is_certain(self, before: float, rest: float, error: float) -> bool:
        """Masses of at most `before` and at least `rest`, but for the error and what weights are wrong by, mean that a
        token is of the nucleus."""
        odds = self._top_p * (1.0 - _ROUNDING), (1.0 - self._top_p) * (1.0 + _ROUNDING)
        return odds[0] * (rest - error) > odds[1] * (before + error) * _EXCESS_MAX

    def _mass(self, is_wanted: BoolArray, weights: FloatArray) -> float:
        return float(np.einsum("i,i->", weights, is_wanted.astype(np.float32))) * self._unit


def total_mass(row: FloatArray, peak: float, temperature: float) -> tuple[float, float]:
    """Bounds, narrow ones, of the mass of all tokens, in units of the likeliest's, whose logit `peak` is finite."""
    masses = np.subtract(row, np.float32(peak))
    with np.errstate(over="ignore"):  # to minus infinity, whose mass is 0
        masses *= np.float32(1.0 / temperature)
    total = _sum(np.exp(masses, out=masses))
    return total * (1.0 - _SUM_ERROR), total * (1.0 + _SUM_ERROR)


def exact_masses(values: FloatArray, peak: float, temperature: float) -> DoubleArray:
    """The masses of tokens with these logits."""
    found = distances(values, peak, temperature)
    return np.exp(found, out=found)


def distances(values: FloatArray, peaks: DoubleArray | float, temperatures: DoubleArray | float) -> DoubleArray:
    """Of logits from the peak, in units of the temperature; float64."""
    found = values.astype(np.float64)
    found -= peaks
    found /= temperatures
    return found


def _weights(row: FloatArray, peak: float, temperature: float) -> tuple[FloatArray, float]:
    """exp() of the logits, too large by up to _EXCESS_MAX, and what one weight is worth.

    Schraudolph 1999, "A Fast, Compact Approximation of the Exponential Function": the number whose binary logarithm is
    wanted, as an integer, is read as float32, whose high bits are an exponent."""
    if abs(peak) > _PEAK_MAX * temperature:
        weights = np.subtract(row, np.float32(peak))
        with np.errstate(over="ignore"):  # to minus infinity, whose weight is 0
            weights *= np.float32(1.0 / temperature)
        return np.exp(weights, out=weights), 1.0
    base = np.float32(peak - _DEPTH * temperature)
    if row.min() < base:
        # What is below counts as if it were there: all together less than 1e-30 of any token that can win.
        row = np.maximum(row, base)
    bits = np.subtract(row, base)
    bits *= np.float32(_EXPONENT_ONE / math.log(2.0) / temperature)
    unit = 2.0**_EXPONENT_BIAS * math.exp((float(base) - peak) / temperature)
    return bits.astype(np.int32).view(np.float32), unit


def _sum(weights: FloatArray) -> float:
    """einsum takes half of the time that sum() does."""
    return float(np.einsum("i->", weights))
