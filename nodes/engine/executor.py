"""Runs one plan of the scheduler on a session: moves, the decode step, the prompt chunks, and the choice of tokens.

On the engine thread alone. What raises in between is caught here, because only here is known whose step it was.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from nodes.engine.grammar import MaskWorker
from nodes.engine.kv_slots import CopyRows, KvSlots, Move, SwapRows
from nodes.engine.logit_rows import LogitBlocks
from nodes.engine.sampler import sample
from nodes.engine.sampling import Sampled
from nodes.engine.scheduler import Plan, PrefillChunk
from nodes.engine.sequence import Sequence

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


class Session(Protocol):
    """A model that runs, with the KV rows of `slots` sequences of up to `capacity` tokens. One thread uses it.

    Its implementations are nodes.engine.session.OnnxSession; tests have another."""

    @property
    def slots(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def vocabulary_size(self) -> int: ...
    @property
    def kv_bytes(self) -> int: ...
    @property
    def is_exact(self) -> bool:
        """All arithmetic is float32, so that rows written by a chunk and by a step may be mixed."""
        ...

    @property
    def steady_rows_min(self) -> int:
        """The fewest rows of a decode step from which a row's logits do not depend on how many there are."""
        ...

    @property
    def prefill_tokens_max(self) -> int:
        """Of one prefill(), a multiple of BLOCK_TOKENS. More than one block only where blocks give the same bits
        together as alone, but for those of a single token."""
        ...

    def decode(self, token_ids: IntArray, lengths: IntArray) -> FloatArray:
        """Feed token_ids[i] to slot i at row lengths[i]. Returns float32 [k, vocabulary], valid until the next call."""
        ...

    @property
    def logit_blocks(self) -> LogitBlocks | None:
        """Of what decode() returns, always of the last call; None where the graph does not tell."""
        ...

    def prefill(self, slot: int, token_ids: IntArray, start: int) -> FloatArray:
        """Write rows from `start` on, prefill_tokens_max at most. Returns float32 [vocabulary] after the last, valid
        until the next call."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy rows [0, length) of one slot to another."""
        ...

    def swap(self, first: int, second: int, first_length: int, second_length: int) -> None:
        """Exchange rows [0, first_length) of one slot and [0, second_length) of another."""
        ...

    def recover(self) -> None:
        """Forget whatever a step that broke may have left half done. Rows keep what they hold."""
        ...


@dataclass(slots=True)
class Execution:
    """What came of a plan.

    tokens: one for each sequence of plan.decode, empty where that step broke. first_token: after a prompt's last chunk.
    decode_s, prefill_s: in the session. fault: what was raised; broken: whose step it was. are_rows_lost: rows were
    being moved, so that no slot can be trusted any more."""

    tokens: list[Sampled]
    first_token: Sampled | None = None
    decode_s: float = 0.0
    prefill_s: float = 0.0
    fault: Exception | None = None
    broken: SequenceOf[Sequence] = ()
    are_rows_lost: bool = False


class Executor:
    """The steps of one session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._masks = MaskWorker()

    def close(self) -> None:
        """End the thread that computes grammars' masks. Any number of times."""
        self._masks.close()

    def execute(self, plan: Plan, kv: KvSlots) -> Execution:
        """Do what the plan says. Raises nothing that the session raises; see Execution.fault."""
        done = Execution([], are_rows_lost=True)
        try:
            for move in plan.moves:
                self._move(move)
            done.are_rows_lost = False
            if plan.decode:
                done.broken = plan.decode
                done.tokens, done.decode_s = self._decode(plan.decode, kv)
            for chunk in plan.prefill:
                done.broken = (chunk.sequence,)
                done.first_token, seconds = self._prefill(chunk)
                done.prefill_s += seconds
        except Exception as exc:  # ONNX Runtime has no common root for what it raises
            done.fault = exc
        return done

    def _move(self, move: Move) -> None:
        match move:
            case CopyRows():
                self._session.copy(move.source, move.target, move.length)
            case SwapRows():
                self._session.swap(move.first, move.second, move.first_length, move.second_length)

    def _decode(self, batch: SequenceOf[Sequence], kv: KvSlots) -> tuple[list[Sampled], float]:
        """One token per sequence, and the seconds that the session took."""
        count = rows = len(batch)
        states = [sequence.sampling for sequence in batch]
        if count < self._session.steady_rows_min and any(sequence.params.is_reproducible for sequence in batch):
            # Idle slots decode along: each gets a row after its valid ones, which nobody reads.
            rows = min(self._session.steady_rows_min, kv.slots)
        self._masks.begin(states)
        started = time.perf_counter()
        logits = self._session.decode(kv.next_ids[:rows], kv.lengths[:rows])
        seconds = time.perf_counter() - started
        self._masks.wait()
        return sample(logits[:count], states, self._session.logit_blocks), seconds

    def _prefill(self, chunk: PrefillChunk) -> tuple[Sampled | None, float]:
        """The answer's first token after the last chunk, and the seconds that the session took."""
        state = chunk.sequence.sampling
        if chunk.is_last:
            self._masks.begin([state])
        started = time.perf_counter()
        logits = self._session.prefill(chunk.slot, np.asarray(chunk.token_ids, np.int64), chunk.start)
        seconds = time.perf_counter() - started
        if not chunk.is_last:
            return None, seconds
        self._masks.wait()
        return sample(logits[None], [state])[0], seconds
