"""What the engine does next: which sequences decode, which prompt is prefilled by how much, who leaves. Sees no clock,
no thread and no session.

A tick is plan(), its execution by the caller, commit(). Between the two, submit() and cancel() may be called; they
change neither a slot nor a length. A tick decodes one token of every sequence whose prompt is done, then prefills at
most one block of one prompt, so a long prompt delays the others by one block a token. An answer that another engine has
begun gets several a tick: its reader is in the middle of a text that has stopped. Prompts are prefilled in order of
arrival, fairly between askers.

Chunks end at absolute multiples of BLOCK_TOKENS. Where it changes no result (Session.prefill_tokens_max) a chunk may
have several blocks, which takes less time than each block alone: those of an answer begun elsewhere, and those of a
prompt that no decode step waits for. A block of one token stays a chunk of its own there, since other kernels compute a
single row. So nothing depends on how a prompt was cut, nor on who else was there.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from nodes.engine.errors import DeadlinePassed, EngineError, EngineFault, QueueFull
from nodes.engine.fair_queue import FairQueue
from nodes.engine.kv_slots import BLOCK_TOKENS, KvSlots, Move
from nodes.engine.sampler import INVALID
from nodes.engine.sampling import Sampled
from nodes.engine.sequence import Phase, Progress, Sequence

# Blocks of a prompt in a tick that decodes. One takes about as long as a decode step of a full batch, so prefilling
# halves the others' rate, not more.
SHARED_BLOCKS = 1
# Blocks a tick of an answer begun elsewhere. When a node dies its answers come together, each with all its tokens so
# far to prefill; with one block a tick the last of them would stand still for as many steps as all have blocks.
RESUMED_BLOCKS = 4
# How long several blocks of a prompt may take where nobody decodes: so long a client that leaves keeps its slot. To an
# entry a node whose steps stand still for nodes.witness.HANG_MIN_S hangs; this is a quarter of it.
LONE_PREFILL_S = 0.5
# Answers begun elsewhere that may wait beyond a full queue, for each slot: what three nodes as large as this decoded
# when they died. They are never refused for the sake of requests that nobody has answered yet.
RESUMED_PER_SLOT = 3


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Ids to write at KV rows [start, start + len(token_ids)) of `slot`. is_last: what it ends with has logits that
    are of use."""

    sequence: Sequence
    slot: int
    start: int
    token_ids: SequenceOf[int]
    is_last: bool


@dataclass(frozen=True, slots=True)
class Failed:
    """The sequence has ended without finishing."""

    sequence: Sequence
    error: EngineError


Outcome = Progress | Failed


@dataclass(frozen=True, slots=True)
class Plan:
    """One tick: do `moves` in order, decode one token of each of `decode` in slots [0, len), then `prefill`.

    prefill: chunks of one sequence, one after the other. expired: what passed its deadline, to be told to the readers.
    """

    moves: SequenceOf[Move] = ()
    decode: SequenceOf[Sequence] = ()
    prefill: SequenceOf[PrefillChunk] = ()
    expired: SequenceOf[Failed] = field(default_factory=tuple)

    @property
    def has_steps(self) -> bool:
        return bool(self.decode or self.prefill)


@dataclass(frozen=True, slots=True)
class SchedulerLoad:
    """active: sequences that have a slot or find one free. queued: those that wait for one. queued_tokens: prompt
    tokens not prefilled yet, of all of them."""

    active: int
    queued: int
    free_slots: int
    queued_tokens: int


@dataclass(slots=True)
class CacheCounts:
    """Of all prompts that were given a slot: how many, how many found rows of theirs in one, and their tokens."""

    queries: int = 0
    hits: int = 0
    query_tokens: int = 0
    hit_tokens: int = 0


class Scheduler:
    """Places sequences in `slots` slots; at most `queue_limit` more wait, of all askers together, and some that another
    engine has begun.

    mixes_rows: see KvSlots. chunk_tokens_max: a multiple of BLOCK_TOKENS."""

    def __init__(
        self, slots: int, queue_limit: int, *, mixes_rows: bool = True, chunk_tokens_max: int = BLOCK_TOKENS
    ) -> None:
        assert chunk_tokens_max % BLOCK_TOKENS == 0
        self.kv = KvSlots(slots, mixes_rows=mixes_rows)
        self.cache = CacheCounts()
        self._queue_limit = queue_limit
        self._waiting = FairQueue()  # bounded by submit()
        self._queued_tokens = 0
        self._leaving = 0  # sequences that are over and whose slots the next plan() gives back
        # The last plan, where it holds on until somebody waits or leaves, or until this time: most plans are like it.
        self._steady: Plan | None = None
        self._steady_until = 0.0
        self._chunk_blocks_max = chunk_tokens_max // BLOCK_TOKENS
        self._lone_blocks = 1  # a tick that decodes nothing, until it is known how long they take

    def submit(self, sequence: Sequence) -> Sequence | None:
        """Queue a new sequence. Returns the one that waited and has ended because its asker held most of a full queue,
        None as a rule. Raises QueueFull; nothing was changed then."""
        queued = len(self._waiting) - self._free
        limit = self._queue_limit + (RESUMED_PER_SLOT * self.kv.slots if sequence.is_resumed else 0)
        displaced = None
        if queued >= limit:
            if not sequence.is_resumed:
                displaced = self._waiting.displace_for(sequence.fairness_id)
            if displaced is None:
                raise QueueFull(max(0, queued), limit)
            self._end(displaced)
        self._waiting.push(sequence)
        self._queued_tokens += len(sequence.prefill_ids)
        return displaced

    def cancel(self, sequence: Sequence) -> None:
        """End the sequence without a further event: now if it waits, else at the next plan(). Any number of times."""
        if sequence.phase is Phase.WAITING:
            self._waiting.remove(sequence)
            self._end(sequence)
        elif sequence.phase is not Phase.ENDED and not sequence.is_cancelled:
            self._leaving += 1
        sequence.is_cancelled = True

    def plan(self, now: float) -> Plan:
        """The next tick. Slots are taken and given back here and nowhere else."""
        if self._steady is not None and not self._leaving and not self._waiting and now < self._steady_until:
            return self._steady
        expired: list[Failed] = []
        moves = self._release_ended(now, expired)
        moves += self._settle_prefilled(now, expired)
        self._leaving = 0
        for sequence in self._waiting.pop_expired(now):
            self._end(sequence)
            expired.append(Failed(sequence, DeadlinePassed("the deadline passed before a slot became free")))
        if self.kv.prefilling is None and self._waiting and self.kv.free:
            moves += self._place(self._waiting.pop(), now)
        decoding = self.kv.decoding()
        self._steady = None
        if decoding and self.kv.prefilling is None:
            self._steady = Plan(decode=decoding)
            self._steady_until = min(sequence.deadline for sequence in decoding)
        return Plan(moves, decoding, self._next_chunks(), expired)

    def commit(
        self, plan: Plan, tokens: SequenceOf[Sampled], first_token: Sampled | None, prefill_s: float = 0.0
    ) -> list[Outcome]:
        """Record that the plan was executed.

        tokens: one for each of plan.decode; that of a sequence with a forced_id is ignored. first_token: the one
        sampled after the last chunk, else None. prefill_s: that the chunks took; 0.0 where it was not measured.
        """
        prefilled = sum(len(chunk.token_ids) for chunk in plan.prefill)
        if prefill_s > 0.0 and prefilled >= BLOCK_TOKENS:  # of fewer each takes longer
            blocks = int(LONE_PREFILL_S / prefill_s * prefilled / BLOCK_TOKENS)
            self._lone_blocks = max(1, min(blocks, self._chunk_blocks_max))
        outcomes: list[Outcome] = []
        for slot, (sequence, token) in enumerate(zip(plan.decode, tokens, strict=True)):
            self.kv.lengths[slot] += 1  # one by one: after a step numpy's code for all at once is cold, and takes 35 us
            self._accept(sequence, slot, token, outcomes)
        for chunk in plan.prefill:
            self.kv.lengths[chunk.slot] += len(chunk.token_ids)
            chunk.sequence.prefilled += len(chunk.token_ids)
            self._queued_tokens -= len(chunk.token_ids)
            if chunk.is_last:
                assert first_token is not None
                self._accept(chunk.sequence, chunk.slot, first_token, outcomes)
        return outcomes

    def fail(self, sequences: SequenceOf[Sequence], error: EngineError) -> list[Outcome]:
        """End sequences that have a slot, because their step broke. Their rows up to their lengths are still valid."""
        outcomes: list[Outcome] = []
        for sequence in sequences:
            if sequence.phase is not Phase.ENDED and not sequence.is_cancelled:
                self._leave(sequence)
                outcomes.append(Failed(sequence, error))
        return outcomes

    def fail_placed(self, error: EngineError) -> list[Outcome]:
        """End every sequence that has a slot and forget all rows: none can be trusted any more."""
        outcomes = self.fail(self._placed(), error)
        for sequence in self._placed():
            self._end(sequence)
        self.kv.clear()
        self._leaving, self._steady = 0, None
        return outcomes

    def abandon(self) -> None:
        """End every sequence at once. A plan made before is not to be committed."""
        for sequence in (*self._waiting, *self._placed()):
            self._end(sequence)
        self._waiting.clear()
        self.kv.clear()
        self._leaving, self._steady = 0, None

    def load(self) -> SchedulerLoad:
        placeable = min(len(self._waiting), self._free)
        free = self._free - placeable
        return SchedulerLoad(self.kv.slots - free, len(self._waiting) - placeable, free, self._queued_tokens)

    def remaining_tokens(self, answer_tokens: float) -> list[float]:
        """How many tokens each sequence in a slot is still expected to generate, when answers have answer_tokens."""
        return [
            min(
                float(sequence.token_limit - len(sequence.generated_ids)),
                max(answer_tokens - len(sequence.generated_ids), answer_tokens / 4),
            )
            for sequence in self._placed()
        ]

    @property
    def _free(self) -> int:
        return self.kv.free + self._leaving

    def _placed(self) -> list[Sequence]:
        prefilling = self.kv.prefilling
        return self.kv.decoding() + ([prefilling[1]] if prefilling is not None else [])

    def _place(self, sequence: Sequence, now: float) -> list[Move]:
        sequence.phase, sequence.placed_at = Phase.PREFILLING, now
        moves = self.kv.begin(sequence)
        total, found = len(sequence.prefill_ids), sequence.cached_tokens
        self._queued_tokens -= found
        self._waiting.charge(sequence.fairness_id, prompt_tokens=total - found, weight=sequence.weight)
        self.cache.queries += 1
        self.cache.hits += found > 0
        self.cache.query_tokens += total
        self.cache.hit_tokens += found
        return moves

    def _accept(self, sequence: Sequence, slot: int, sampled: Sampled, outcomes: list[Outcome]) -> None:
        if sequence.is_cancelled:
            return
        if (forced_id := sequence.forced_id) is not None:
            self.kv.next_ids[slot] = forced_id
            sequence.replayed += 1
            return
        if sampled.token_id == INVALID:
            self._leave(sequence)
            reason = sequence.sampling.error
            if reason is None:
                reason = "the model's logits are not finite numbers"
                sequence.has_valid_rows = False
            outcomes.append(Failed(sequence, EngineFault(reason)))
            return
        try:
            progress = sequence.accept(sampled)
        except BaseException as exc:  # of the tokenizer, whose panics are no Exception: one request's fault is its own
            self._leave(sequence)
            outcomes.append(Failed(sequence, text_fault(exc)))
            return
        self._waiting.charge(sequence.fairness_id, generated_tokens=1, weight=sequence.weight)
        if progress.finish_reason is None:
            self.kv.next_ids[slot] = sampled.token_id
        else:
            self._leave(sequence)
        outcomes.append(progress)

    def _release_ended(self, now: float, expired: list[Failed]) -> list[Move]:
        leaving = [slot for slot, sequence in enumerate(self.kv.decoding()) if self._is_over(sequence, now, expired)]
        return self.kv.release(leaving) if leaving else []

    def _settle_prefilled(self, now: float, expired: list[Failed]) -> list[Move]:
        """The sequence in prefill leaves, or joins the decode batch once its prompt is done."""
        if self.kv.prefilling is None:
            return []
        _, sequence = self.kv.prefilling
        if self._is_over(sequence, now, expired):
            self.kv.release_prefilling()
        elif sequence.prefilled == len(sequence.prefill_ids):
            sequence.phase = Phase.DECODING
            return self.kv.promote()
        return []

    def _is_over(self, sequence: Sequence, now: float, expired: list[Failed]) -> bool:
        """True when the sequence leaves its slot: it has ended, was cancelled, or ends here because it is late."""
        if sequence.phase is Phase.ENDED:
            return True
        if sequence.is_cancelled:
            self._end(sequence)
            return True
        if now >= sequence.deadline:
            self._end(sequence)
            expired.append(Failed(sequence, DeadlinePassed("the deadline passed before the answer was complete")))
            return True
        return False

    def _next_chunks(self) -> list[PrefillChunk]:
        if self.kv.prefilling is None:
            return []
        slot, sequence = self.kv.prefilling
        blocks = SHARED_BLOCKS if self.kv.active else self._lone_blocks
        if sequence.is_resumed:
            blocks = RESUMED_BLOCKS
        chunks: list[PrefillChunk] = []
        end, total = sequence.prefilled, len(sequence.prefill_ids)
        until = min(total, (end // BLOCK_TOKENS + blocks) * BLOCK_TOKENS)
        while end < until:
            start = end
            end = min(until, (start // BLOCK_TOKENS + self._chunk_blocks_max) * BLOCK_TOKENS)
            if start % BLOCK_TOKENS == BLOCK_TOKENS - 1:  # a single token stays alone, here and at the prompt's end
                end = start + 1
            elif end % BLOCK_TOKENS == 1 and end - start > 1:
                end -= 1
            chunks.append(PrefillChunk(sequence, slot, start, sequence.prefill_ids[start:end], end == total))
        return chunks

    def _leave(self, sequence: Sequence) -> None:
        """The sequence in a slot is over; the next plan() gives the slot back."""
        self._end(sequence)
        self._leaving += 1

    def _end(self, sequence: Sequence) -> None:
        if sequence.phase is not Phase.ENDED:
            sequence.phase = Phase.ENDED
            self._queued_tokens -= len(sequence.prefill_ids) - sequence.prefilled


def text_fault(error: BaseException) -> EngineFault:
    """error: what the text decoder raised."""
    return EngineFault(f"the answer's text cannot be made: {type(error).__name__}")
