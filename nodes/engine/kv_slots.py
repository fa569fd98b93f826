"""Which sequence is in which KV slot, and how many rows of it are valid. Moves no bytes: it returns what to move.

Decoding sequences are in slots [0, active), without holes, because ONNX Runtime computes a batch over contiguous slots
and pays for idle ones in full (1 of 8 busy: 12.8 ms instead of 4.7). One more sequence may be prefilling, in a slot at
or past `active`, where no decode step writes. A sequence that leaves is replaced by the one in the last active slot; a
sequence whose prompt is done joins at `active`: in place, unless the batch shrank meanwhile. So a leave or a join costs
at most one copy of one slot's valid rows (800 rows of a 200M model: 1.1 ms), and joining an otherwise calm batch none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nodes.engine.sequence import Sequence

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SlotMove:
    """Rows [0, length) of slot `source` are to be copied to slot `target`. Moves are done in the order returned."""

    source: int
    target: int
    length: int


class KvSlots:
    """The table of slots.

    lengths: int64 [slots], the only truth about which rows are valid; rows from it on are garbage.
    next_ids: int64 [slots], the token that each decoding sequence feeds next.
    """

    def __init__(self, slots: int) -> None:
        assert slots > 0
        self.lengths: IntArray = np.zeros(slots, np.int64)
        self.next_ids: IntArray = np.zeros(slots, np.int64)
        self._sequences: list[Sequence | None] = [None] * slots
        self._active = 0
        self._prefilling: int | None = None

    @property
    def slots(self) -> int:
        return len(self._sequences)

    @property
    def active(self) -> int:
        """Sequences that decode, in slots [0, active)."""
        return self._active

    @property
    def prefilling(self) -> tuple[int, Sequence] | None:
        """The slot and the sequence whose prompt is being prefilled."""
        if self._prefilling is None:
            return None
        return self._prefilling, self._at(self._prefilling)

    @property
    def free(self) -> int:
        return self.slots - self._active - (self._prefilling is not None)

    def decoding(self) -> list[Sequence]:
        """The decode batch, in slot order."""
        return [self._at(slot) for slot in range(self._active)]

    def begin(self, sequence: Sequence) -> int:
        """Give the sequence an empty slot to be prefilled in. Only while none is prefilling and a slot is free."""
        assert self._prefilling is None, "one sequence is prefilled at a time"
        assert self.free > 0, "no free slot"
        slot = self._active
        self._sequences[slot] = sequence
        self.lengths[slot] = 0
        self._prefilling = slot
        return slot

    def promote(self) -> SlotMove | None:
        """Let the prefilled sequence join the decode batch. Its rows' move, if it is not next to the batch."""
        assert self._prefilling is not None, "nothing is prefilling"
        source, target = self._prefilling, self._active
        self._prefilling = None
        self._active += 1
        return None if source == target else self._move(source, target)

    def release_prefilling(self) -> None:
        """The sequence that was prefilling leaves; its slot is free."""
        assert self._prefilling is not None, "nothing is prefilling"
        self._sequences[self._prefilling] = None
        self._prefilling = None

    def release(self, slots: list[int]) -> list[SlotMove]:
        """The sequences in these active slots leave. The moves that close the holes; no target is another's source."""
        for slot in slots:
            assert 0 <= slot < self._active, f"slot {slot} is not among the {self._active} active ones"
            self._sequences[slot] = None
        remaining = self._active - len(slots)
        stayers = [slot for slot in range(remaining, self._active) if self._sequences[slot] is not None]
        holes = [slot for slot in range(remaining) if self._sequences[slot] is None]
        self._active = remaining
        return [self._move(source, target) for source, target in zip(stayers, holes, strict=True)]

    def clear(self) -> None:
        """All leave."""
        self._sequences = [None] * self.slots
        self._active = 0
        self._prefilling = None

    def _move(self, source: int, target: int) -> SlotMove:
        self._sequences[target], self._sequences[source] = self._at(source), None
        self.lengths[target] = self.lengths[source]
        self.next_ids[target] = self.next_ids[source]
        return SlotMove(source, target, int(self.lengths[target]))

    def _at(self, slot: int) -> Sequence:
        sequence = self._sequences[slot]
        assert sequence is not None, f"slot {slot} is empty"
        return sequence
