"""Log-probabilities of the model's own distribution: natural logarithms, before anything a request changes."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from nodes.engine.draw import largest
from nodes.engine.sampling import TOP_LOGPROBS_MAX, TokenLogprobs

FloatArray = npt.NDArray[np.float32]

_UNIT = 1.0  # of the distance between likely tokens' logits: that of a model at temperature 1


class RowLogprobs:
    """Those of one row of logits, float32 [vocabulary], whose largest value `peak` is finite."""

    __slots__ = ("_log_total", "_row", "_top")

    def __init__(self, row: FloatArray, peak: float, top: int, *, is_row_kept: bool) -> None:
        """top: how many of the likeliest to tell. is_row_kept: nobody changes the row before token() is called."""
        weights = np.subtract(row, np.float32(peak))
        np.exp(weights, out=weights)
        self._log_total = peak + math.log(float(weights.sum()))
        self._row = row if is_row_kept else row.copy()
        ids = largest(row, peak, min(top, TOP_LOGPROBS_MAX), _UNIT) if top > 0 else np.empty(0, np.int64)
        ids = ids[np.argsort(-row[ids], kind="stable")]
        self._top = tuple((int(token_id), self._of(int(token_id))) for token_id in ids)

    def token(self, token_id: int) -> TokenLogprobs:
        """Minus infinity for a token that the model itself excludes and a bias or a grammar brought in."""
        return TokenLogprobs(token_id, self._of(token_id), self._top)

    def _of(self, token_id: int) -> float:
        return float(self._row[token_id]) - self._log_total
