"""Which sequence is in which KV slot, which rows are valid, and what idle slots still hold. Moves no bytes: it returns
what to move.

Decoding sequences are in slots [0, active), without holes, because ONNX Runtime computes a batch over contiguous slots
and pays for idle ones in full (1 of 8 busy: 12.8 ms instead of 4.7). One more sequence may be prefilling, in a slot at
or past `active`, where no decode step writes. A sequence that leaves is replaced by the one in the last active slot; a
sequence whose prompt is done joins at `active`: in place, unless the batch shrank meanwhile.

Idle slots are the prefix cache: the rows of a sequence that left stay until the slot is needed. A new sequence takes
the longest beginning that it shares with any slot, busy ones included, instead of computing it again; of idle slots the
one used longest ago is given up first. A copy of 800 rows of a 200M model takes 1.1 ms, computing them a second.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nodes.engine.sequence import Sequence

IntArray = npt.NDArray[np.int64]

# Chunks of a prompt end at multiples of it. Where rows must not be mixed they are reused in whole blocks, so that what
# is computed after them is cut as it would be without them. A beginning shorter than a block is not worth a copy.
BLOCK_TOKENS = 64


@dataclass(frozen=True, slots=True)
class CopyRows:
    """Rows [0, length) of slot `source` are to be copied to slot `target`."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class SwapRows:
    """Rows [0, first_length) of slot `first` and [0, second_length) of slot `second` change places."""

    first: int
    second: int
    first_length: int
    second_length: int


Move = CopyRows | SwapRows


@dataclass(slots=True)
class Retained:
    """Rows that an idle slot holds: of these ids. last_used: the larger, the later."""

    ids: list[int]
    text_blocks: tuple[int, ...]
    last_used: int


@dataclass(frozen=True, slots=True)
class Match:
    """The longest reusable beginning of some ids: `length` rows of `slot`; 0 and no slot when there is none."""

    slot: int | None
    length: int


class KvSlots:
    """The table of slots.

    mixes_rows: rows written by prefill chunks and by decode steps are interchangeable, which holds in float32 alone;
    else only whole chunks of what was prefilled are reused. lengths: int64 [slots], the only truth about which rows are
    valid; rows from it on are garbage. next_ids: int64 [slots], the token that each decoding sequence feeds next.
    Moves are to be done in the order returned, before anything else is written.
    """

    def __init__(self, slots: int, *, mixes_rows: bool = True) -> None:
        assert slots > 0
        self.lengths: IntArray = np.zeros(slots, np.int64)
        self.next_ids: IntArray = np.zeros(slots, np.int64)
        self._mixes_rows = mixes_rows
        self._sequences: list[Sequence | None] = [None] * slots
        self._retained: list[Retained | None] = [None] * slots  # None where a sequence is
        self._active = 0
        self._prefilling: int | None = None
        self._uses = 0

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

    def retained(self) -> list[Retained]:
        """What idle slots hold."""
        return [rows for rows in self._retained if rows is not None]

    def rows(self) -> tuple[int, int]:
        """(rows of sequences in slots, rows that idle slots keep for prompts to come)."""
        used = sum(int(self.lengths[slot]) for slot, sequence in enumerate(self._sequences) if sequence is not None)
        return used, sum(len(rows.ids) for rows in self.retained())

    def conversations(self) -> list[tuple[int, ...]]:
        """By slot that holds rows of a named conversation: the names of the text blocks they cover. Those of busy slots
        first, then the most recently used; at most one for each slot."""
        busy = [
            _blocks_of(sequence, int(self.lengths[slot]))
            for slot, sequence in enumerate(self._sequences)
            if sequence is not None
        ]
        idle = sorted(self.retained(), key=lambda rows: -rows.last_used)
        return [blocks for blocks in (*busy, *(rows.text_blocks for rows in idle)) if blocks]

    def match(self, ids: list[int]) -> Match:
        """The longest beginning of ids that a slot holds: a block at least, and never all, so that there are logits."""
        best = Match(None, 0)
        limit = self._reusable(len(ids) - 1)
        if limit < BLOCK_TOKENS:
            return best
        first_block = ids[:BLOCK_TOKENS]
        for slot in range(self.slots):
            sequence = self._sequences[slot]
            if sequence is not None and first_block != sequence.prefill_ids[:BLOCK_TOKENS]:
                continue  # as a rule; spares putting its ids together
            length = self._reusable(_common_length(ids, self._held_ids(slot), limit))
            if length >= BLOCK_TOKENS and length > best.length:
                best = Match(slot, length)
        return best

    def begin(self, sequence: Sequence) -> list[Move]:
        """Give the sequence a slot to be prefilled in, with as many rows as some slot has of it already. Only while
        none is prefilling and a slot is free. The moves that bring them there."""
        assert self._prefilling is None, "one sequence is prefilled at a time"
        assert self.free > 0, "no free slot"
        found = self.match(sequence.prefill_ids)
        target = self._active
        moves = self._bring(found, target)
        self._sequences[target], self._retained[target] = sequence, None
        self.lengths[target] = found.length
        sequence.prefilled = sequence.cached_tokens = found.length
        self._prefilling = target
        return moves

    def promote(self) -> list[Move]:
        """Let the prefilled sequence join the decode batch. Its rows' move, if it is not next to the batch."""
        assert self._prefilling is not None, "nothing is prefilling"
        source, target = self._prefilling, self._active
        self._prefilling = None
        self._active += 1
        return [] if source == target else [self._exchange(source, target)]

    def release_prefilling(self) -> None:
        """The sequence that was prefilling leaves; its slot is free and keeps its rows."""
        assert self._prefilling is not None, "nothing is prefilling"
        self._retire(self._prefilling)
        self._prefilling = None

    def release(self, slots: list[int]) -> list[Move]:
        """The sequences in these active slots leave. The moves that close the holes; none touches another's slots."""
        for slot in slots:
            assert 0 <= slot < self._active, f"slot {slot} is not among the {self._active} active ones"
            self._retire(slot)
        remaining = self._active - len(slots)
        stayers = [slot for slot in range(remaining, self._active) if self._sequences[slot] is not None]
        holes = [slot for slot in range(remaining) if self._sequences[slot] is None]
        self._active = remaining
        return [self._exchange(source, target) for source, target in zip(stayers, holes, strict=True)]

    def clear(self) -> None:
        """All leave, and no row is kept."""
        self._sequences = [None] * self.slots
        self._retained = [None] * self.slots
        self.lengths[:] = 0
        self._active = 0
        self._prefilling = None

    def _held_ids(self, slot: int) -> SequenceOf[int]:
        """Ids of the slot's rows that another sequence may reuse."""
        sequence, rows = self._sequences[slot], self._retained[slot]
        if sequence is not None:
            return self._reusable_ids(slot, sequence)
        return rows.ids if rows is not None else ()

    def _reusable_ids(self, slot: int, sequence: Sequence) -> list[int]:
        if not sequence.has_valid_rows:
            return []
        length = int(self.lengths[slot])
        if self._mixes_rows:
            return [*sequence.prompt_ids, *sequence.generated_ids][:length]
        return sequence.prefill_ids[: self._reusable(min(length, len(sequence.prefill_ids)))]

    def _reusable(self, length: int) -> int:
        return length if self._mixes_rows else length // BLOCK_TOKENS * BLOCK_TOKENS

    def _retire(self, slot: int) -> None:
        """The slot's sequence leaves; rows worth a block stay."""
        sequence = self._at(slot)
        self._sequences[slot] = None
        ids = self._reusable_ids(slot, sequence)
        if len(ids) >= BLOCK_TOKENS:
            self._uses += 1
            self._retained[slot] = Retained(ids, _blocks_of(sequence, len(ids)), self._uses)
            self.lengths[slot] = len(ids)
        else:
            self._empty(slot)

    def _bring(self, found: Match, target: int) -> list[Move]:
        """Let the idle slot `target` hold the rows found, and lose as little as can be of what idle slots retain."""
        source = found.slot
        rows = None if source is None else self._retained[source]
        if rows is not None:
            self._uses += 1
            rows.last_used = self._uses
        # Rows that the new sequence contains as a whole are worth nothing beside it.
        if rows is not None and len(rows.ids) - found.length < BLOCK_TOKENS:
            assert source is not None
            if source == target:
                return []
            return [self._exchange(source, target)]
        moves: list[Move] = []
        if (kept := self._retained[target]) is not None:
            refuge = self._refuge(kept, exclude=(target, source))
            if refuge is not None:
                moves.append(CopyRows(target, refuge, len(kept.ids)))
                self._retained[refuge] = kept
                self.lengths[refuge] = len(kept.ids)
        if source is not None and source != target:
            moves.append(CopyRows(source, target, found.length))
        return moves

    def _refuge(self, kept: Retained, exclude: tuple[int, int | None]) -> int | None:
        """The idle slot whose content is worth less than these rows: an empty one, else the one used longest ago."""
        idle = [slot for slot in range(self.slots) if slot not in exclude and self._sequences[slot] is None]
        worth = {slot: rows.last_used if (rows := self._retained[slot]) is not None else 0 for slot in idle}
        refuge = min(idle, key=worth.__getitem__, default=None)
        return refuge if refuge is not None and worth[refuge] < kept.last_used else None

    def _exchange(self, source: int, target: int) -> Move:
        """What is in `source` goes to `target`, which is idle; what that retains comes back."""
        assert self._sequences[target] is None, f"slot {target} is busy"
        length, kept, kept_length = int(self.lengths[source]), self._retained[target], int(self.lengths[target])
        self._sequences[target], self._sequences[source] = self._sequences[source], None
        self._retained[target], self._retained[source] = self._retained[source], kept
        self.lengths[target], self.lengths[source] = length, kept_length
        self.next_ids[target] = self.next_ids[source]
        if kept is None:
            self._empty(source)
            return CopyRows(source, target, length)
        return SwapRows(source, target, length, kept_length)

    def _empty(self, slot: int) -> None:
        self._retained[slot] = None
        self.lengths[slot] = 0

    def _at(self, slot: int) -> Sequence:
        sequence = self._sequences[slot]
        assert sequence is not None, f"slot {slot} is empty"
        return sequence


def _blocks_of(sequence: Sequence, rows: int) -> tuple[int, ...]:
    """Names of the text blocks that the first `rows` rows hold, supposed that text and tokens run alike."""
    blocks = sequence.text_blocks
    return blocks[: len(blocks) * min(rows, len(sequence.prompt_ids)) // len(sequence.prompt_ids)]


def _common_length(ids: list[int], held: SequenceOf[int], limit: int) -> int:
    """Tokens, up to limit, in which both begin alike. Whole blocks are compared at once."""
    limit = min(limit, len(held))
    length = 0
    while length < limit:
        end = min(length + BLOCK_TOKENS, limit)
        if ids[length:end] != held[length:end]:
            return length + next(i for i in range(end - length) if ids[length + i] != held[length + i])
        length = end
    return length
