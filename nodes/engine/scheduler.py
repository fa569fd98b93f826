"""Decides what the next engine step computes. Sans-IO: sees no session, no thread and no clock but the `now` it is given.

Each tick: one decode step for all decoding sequences, then at most one prefill chunk of one sequence. Sequences are
admitted in arrival order. Chunks end at absolute multiples of CHUNK_TOKENS, so that a prompt is always cut in the same
places and quantised results do not depend on what else was running.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from nodes.engine.kv_slots import KvSlots, Move
from nodes.engine.sequence import Sequence

CHUNK_TOKENS = 64


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Prompt tokens [start, stop) of a sequence, into its slot."""

    sequence: Sequence
    slot: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One tick: first the expired end, then the moves in order, then decode (row i is slot i), then the chunk."""

    expired: list[Sequence]
    moves: list[Move]
    decode: list[Sequence]
    prefill: PrefillChunk | None


class Scheduler:
    """waiting is bounded by the caller, who alone can refuse: the engine counts what it has let in."""

    def __init__(self, slots: int) -> None:
        self.kv = KvSlots(slots)
        self.waiting: deque[Sequence] = deque()
        self._moves: list[Move] = []

    def submit(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It is finished, cancelled or expired: free its slot, or its place in the queue. Twice is once."""
        if sequence.slot is not None:
            self._note(self.kv.release(sequence))
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def has_work(self) -> bool:
        return bool(self.waiting or self.kv.active)

    def plan(self, now: float) -> Plan:
        """What to compute now. Expired sequences are removed already; the others change by commit_prefill and remove."""
        expired = [s for s in (*self.waiting, *self.kv.decoding, self.kv.prefilling) if s and s.deadline <= now]
        for sequence in expired:
            self.remove(sequence)
        if self.waiting and self.kv.has_room():
            self.kv.begin_prefill(self.waiting.popleft())
        moves, self._moves = self._moves, []
        return Plan(expired, moves, list(self.kv.decoding), self._chunk())

    def _chunk(self) -> PrefillChunk | None:
        sequence = self.kv.prefilling
        if sequence is None:
            return None
        assert sequence.slot is not None
        start = sequence.prefilled
        stop = min(len(sequence.prompt), (start // CHUNK_TOKENS + 1) * CHUNK_TOKENS)
        return PrefillChunk(sequence, sequence.slot, start, stop)

    def commit_prefill(self, chunk: PrefillChunk) -> None:
        """The chunk has been computed. A sequence whose prompt is done decodes from the next tick on."""
        chunk.sequence.prefilled = chunk.stop
        if chunk.sequence.is_prefilled:
            self._note(self.kv.promote())

    def _note(self, move: Move | None) -> None:
        if move is not None:
            self._moves.append(move)
