"""Where a graph with the outputs of nodes.engine.graph_extension writes them in decode steps. On the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nodes.engine.graph_extension import MAXIMA, SUMS
from nodes.engine.logit_rows import BLOCK_LOGITS, LogitBlocks

FloatArray = npt.NDArray[np.float32]


class BlockOutputs:
    """blocks: of the logits of the last step."""

    def __init__(self, logits: npt.NDArray[Any]) -> None:
        """logits: float32 [slots, 1, vocabulary], where the steps write theirs."""
        slots, _, vocabulary = logits.shape
        self._maxima: FloatArray = np.zeros((slots, 1, vocabulary // BLOCK_LOGITS), np.float32)
        self._sums: FloatArray = np.zeros((slots, 1), np.float32)
        self.blocks = LogitBlocks(logits[:, 0], self._maxima[:, 0], self._sums[:, 0])

    def bind(self, binding: Any, count: int) -> None:
        """For steps of `count` rows."""
        for name, buffer in ((MAXIMA, self._maxima), (SUMS, self._sums)):
            binding.bind_output(name, "cpu", 0, np.float32, (count, *buffer.shape[1:]), buffer.ctypes.data)
