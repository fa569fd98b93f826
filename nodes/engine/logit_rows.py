"""Rows of logits, and where the large ones are.

A graph that gives the largest logit of each block (nodes.engine.graph_extension), right where it has made them, spares
reading whole rows: 32,000 logits are 2,000 blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IdArray = npt.NDArray[np.int64]

BLOCK_LOGITS = 16


class LogitBlocks:
    """Of the rows of one step, as the graph gave them."""

    __slots__ = ("_blocks", "_maxima", "_sums")

    def __init__(self, logits: FloatArray, maxima: FloatArray, sums: FloatArray) -> None:
        """logits: [rows, vocabulary], one after the other in memory, the vocabulary a multiple of BLOCK_LOGITS. maxima:
        [rows, blocks]. sums: [rows], of all logits of a row: no number where one of these is none, and then the maxima
        mean nothing. All are looked at when something is asked."""
        assert logits.flags.c_contiguous, "blocks would be a copy"
        self._blocks = logits.reshape(-1, BLOCK_LOGITS)
        self._maxima = maxima
        self._sums = sums

    def likeliest(self, row: int) -> int | None:
        """The lowest id of the row's largest logit; None where a logit is no number."""
        if math.isnan(self._sums[row]):
            return None
        maxima = self._maxima[row]
        block = int(maxima.argmax())
        return block * BLOCK_LOGITS + int(self._blocks[row * len(maxima) + block].argmax())

    def reaching(self, row: int, floor: float) -> IdArray:
        """The ids, ascending, whose logits are at least the floor. take() copies whole blocks in a third of the time of
        an index."""
        maxima, least = self._maxima[row], np.float32(floor)
        blocks = (maxima >= least).nonzero()[0]
        values = self._blocks.take(blocks + row * len(maxima), axis=0)
        found, offsets = (values >= least).nonzero()
        ids: IdArray = blocks.take(found) * BLOCK_LOGITS + offsets
        return ids

    def holding(self, row: int, count: int) -> IdArray | None:
        """Ids, ascending, among which the row's `count` largest logits are: no fewer than that many blocks have one
        that is as large as the least of these blocks' maxima. None where there are not so many blocks with a finite
        logit: they would be all ids."""
        maxima = self._maxima[row]
        if count > len(maxima):
            return None
        floor = float(np.partition(maxima, len(maxima) - count)[len(maxima) - count])
        return self.reaching(row, floor) if floor > -math.inf else None


class LogitRows:
    """Rows of one length, of which blocks may be known: then places[i] is the number there of rows[i], or None where
    that has been changed since."""

    __slots__ = ("_blocks", "_places", "rows")

    def __init__(
        self,
        rows: SequenceOf[FloatArray],
        blocks: LogitBlocks | None = None,
        places: SequenceOf[int | None] = (),
    ) -> None:
        self.rows = rows
        self._blocks = blocks
        self._places = places if blocks is not None else [None] * len(rows)

    def some(self, chosen: SequenceOf[int], changed: dict[int, FloatArray]) -> LogitRows:
        """These, counted from 0, with others in place of some."""
        rows = [changed.get(index, self.rows[index]) for index in chosen]
        return LogitRows(rows, self._blocks, [None if index in changed else self._places[index] for index in chosen])

    def reaching(self, index: int, floor: float) -> IdArray:
        """Of one row the ids, ascending, whose logits are at least the floor."""
        place = self._places[index]
        if self._blocks is None or place is None:
            return (self.rows[index] >= np.float32(floor)).nonzero()[0]
        return self._blocks.reaching(place, floor)

    def holding(self, index: int, count: int) -> IdArray | None:
        """Ids, ascending, among which the row's `count` largest logits are; None where blocks do not tell."""
        place = self._places[index]
        return None if self._blocks is None or place is None else self._blocks.holding(place, count)
