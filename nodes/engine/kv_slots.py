"""Which sequence is in which slot. Decoding sequences occupy [0, decoding_count), so that a step has no idle rows.

An idle row of a decode batch costs what a busy one does; therefore the last one moves into a hole. At most one sequence
is being prefilled; it sits anywhere behind the decoding ones and is moved beside them when its prompt is done.
"""

from __future__ import annotations

from dataclasses import dataclass

from nodes.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Move:
    """Copy the first `length` rows of keys and values from one slot to another, before the next step."""

    source: int
    target: int
    length: int


class KvSlots:
    """The slots of one session. Every method that returns a Move has already changed the sequence's slot."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.decoding: list[Sequence] = []  # by slot
        self.prefilling: Sequence | None = None

    @property
    def active(self) -> int:
        return len(self.decoding) + (self.prefilling is not None)

    def has_room(self) -> bool:
        """True when another sequence may begin its prefill."""
        return self.prefilling is None and len(self.decoding) < self.slots

    def begin_prefill(self, sequence: Sequence) -> None:
        assert self.has_room()
        sequence.slot = len(self.decoding)
        self.prefilling = sequence

    def promote(self) -> Move | None:
        """The prefilled sequence decodes from now on, in the slot behind the others."""
        sequence = self.prefilling
        assert sequence is not None
        self.prefilling = None
        target = len(self.decoding)
        self.decoding.append(sequence)
        return self._place(sequence, target)

    def release(self, sequence: Sequence) -> Move | None:
        """Free its slot; the last decoding sequence moves into the hole."""
        if sequence is self.prefilling:
            self.prefilling = None
            sequence.slot = None
            return None
        hole = sequence.slot
        assert hole is not None
        assert self.decoding[hole] is sequence
        last = self.decoding.pop()
        sequence.slot = None
        if last is sequence:
            return None
        self.decoding[hole] = last
        return self._place(last, hole)

    @staticmethod
    def _place(sequence: Sequence, target: int) -> Move | None:
        source = sequence.slot
        assert source is not None
        sequence.slot = target
        return None if source == target else Move(source, target, sequence.length)
