"""What a request has changed in the logits of single tokens: bias, and penalties for tokens that were there before.

Only the logits of the tokens concerned are touched, whose ids and counts are kept from token to token.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IdArray = npt.NDArray[np.int64]

_ROOM_MIN = 64  # distinct ids; the arrays double when they are full, up to the vocabulary


class LogitBias:
    """What is added to the logits of some tokens. Ids that the vocabulary lacks do nothing."""

    __slots__ = ("_ids", "_values")

    def __init__(self, pairs: SequenceOf[tuple[int, float]]) -> None:
        """pairs: (token id, what is added); the last of one id counts."""
        bias = dict(pairs)
        self._ids = np.fromiter(bias.keys(), np.int64, len(bias))
        self._values = np.fromiter(bias.values(), np.float32, len(bias))

    def apply(self, row: FloatArray) -> None:
        is_known = (self._ids >= 0) & (self._ids < len(row))
        row[self._ids[is_known]] += self._values[is_known]


class Penalties:
    """Presence and frequency penalties for tokens of the answer, repetition penalty for those of prompt and answer."""

    __slots__ = ("_counts", "_frequency", "_ids", "_index", "_pending", "_presence", "_prompt_ids", "_repetition")

    def __init__(self, presence: float, frequency: float, repetition: float, prompt_ids: SequenceOf[int]) -> None:
        """repetition: positive. The others, and what the penalties do: see SamplingParams."""
        self._presence = np.float32(presence)
        self._frequency = np.float32(frequency)
        self._repetition = np.float32(repetition)
        self._prompt_ids: SequenceOf[int] | None = prompt_ids if repetition != 1.0 else ()  # None once they are counted
        self._pending: list[int] = []  # of the answer, since the last apply()
        self._index: dict[int, int] = {}  # id: where it is in the arrays
        self._ids = np.empty(0, np.int64)
        self._counts = np.empty(0, np.float32)  # in the answer; 0 for those that only the prompt has

    def count(self, token_id: int) -> None:
        """The answer's next token is this one."""
        self._pending.append(token_id)

    def apply(self, row: FloatArray) -> None:
        """Change the logits of the tokens that were there before. row: [vocabulary]."""
        self._take_pending(len(row))
        used = len(self._index)
        if not used:
            return
        ids, counts = self._ids[:used], self._counts[:used]
        values = row[ids]
        if self._repetition != 1.0:
            values = np.where(values > 0, values / self._repetition, values * self._repetition)
        if self._frequency:
            values -= self._frequency * counts
        if self._presence:
            values -= self._presence * (counts > 0)
        row[ids] = values

    def _take_pending(self, vocabulary: int) -> None:
        if self._prompt_ids is not None:
            for token_id in sorted(set(self._prompt_ids)):
                self._add(token_id, 0, vocabulary)
            self._prompt_ids = None
        for token_id in self._pending:
            self._add(token_id, 1, vocabulary)
        self._pending.clear()

    def _add(self, token_id: int, count: int, vocabulary: int) -> None:
        if not 0 <= token_id < vocabulary:
            return
        index = self._index.setdefault(token_id, len(self._index))
        if index == len(self._ids):
            room = max(_ROOM_MIN, 2 * index)
            self._ids = np.concatenate((self._ids, np.zeros(room - index, np.int64)))
            self._counts = np.concatenate((self._counts, np.zeros(room - index, np.float32)))
        self._ids[index] = token_id
        self._counts[index] += count
