"""From the hidden states of a text's tokens to one vector: mean, first token, maximum; and vectors of unit length.

In float32, whatever the graph computes in. Padding has no part in anything here.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Pooling = Literal["mean", "cls", "max"]
FloatArray = npt.NDArray[np.float32]

NORM_MIN = 1e-12  # of a vector of zeros, which then stays one


def pool(hidden: npt.NDArray[Any], mask: npt.NDArray[np.int64], pooling: Pooling) -> FloatArray:
    """hidden: [batch, tokens, dimensions]; mask: [batch, tokens], 0 where a row is padded. Returns float32 [batch,
    dimensions]."""
    states = hidden.astype(np.float32, copy=False)
    kept = mask[..., None].astype(np.float32)
    match pooling:
        case "cls":
            return states[:, 0]
        case "max":
            result: FloatArray = np.where(kept > 0, states, -np.inf).max(axis=1).astype(np.float32)
            return result
    # Where and not times 0: a graph may leave anything in padded rows, NaN included.
    total: FloatArray = np.where(kept > 0, states, np.float32(0)).sum(axis=1) / kept.sum(axis=1)
    return total


def normalized(vectors: FloatArray) -> FloatArray:
    """Each row at length 1."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    result: FloatArray = (vectors / np.maximum(lengths, np.float32(NORM_MIN))).astype(np.float32)
    return result


def shortened(vectors: FloatArray, dimensions: int) -> FloatArray:
    """The first so many dimensions of each row, at length 1."""
    return normalized(vectors[:, :dimensions])
