"""The engine of one model: an engine thread that owns session and KV, and the streams by which trio tasks read from it.

The thread plans, runs, samples and commits one tick after the other, posts all events of a tick to the trio thread at
once, and sleeps while no sequence is there. The scheduler is shared: the lock around it is held for bookkeeping only,
never while the model runs, so submitting and cancelling wait for tens of microseconds at most. Streams are touched by
the trio thread alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import trio

from nodes.engine.errors import EngineError, EngineFault, EngineStopped, PromptTooLong, QueueFull
from nodes.engine.meter import Meter
from nodes.engine.model_loader import LoadedModel, ModelFolder, load_model
from nodes.engine.sampler import sample
from nodes.engine.sampling import Sampled, SamplingParams
from nodes.engine.scheduler import Failed, Outcome, Plan, PrefillChunk, Progress, Scheduler
from nodes.engine.sequence import Sequence
from nodes.engine.session import Provider, load_session
from nodes.engine.stream import EngineStream

logger = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

State = Literal["loading", "ready", "failed"]
LOADING: State = "loading"
READY: State = "ready"
FAILED: State = "failed"

# How long run() waits for the step in progress when it is cancelled; a step on a loaded CPU takes up to seconds.
STOP_TIMEOUT_S = 10.0
# An answer's length until answers have been seen, for retry_after_s.
ANSWER_TOKENS_DEFAULT = 256
RETRY_AFTER_MIN_S = 1.0
RETRY_AFTER_MAX_S = 60.0


class Session(Protocol):
    """A model that runs, with the KV rows of `slots` sequences of up to `capacity` tokens. One thread uses it.

    nodes.engine.session.OnnxSession has the details; tests have another."""

    @property
    def slots(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def kv_bytes(self) -> int: ...

    def decode(self, token_ids: IntArray, lengths: IntArray) -> FloatArray:
        """Feed token_ids[i] to slot i at row lengths[i]. Returns float32 [k, vocabulary], valid until the next call."""
        ...

    def prefill(self, slot: int, token_ids: IntArray, start: int) -> FloatArray:
        """Write rows from `start` on. Returns float32 [vocabulary] after the last, valid until the next call."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy rows [0, length) of one slot to another."""
        ...


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """One engine at one instant. Rates in tokens per second over the time spent on them, 0.0 while unmeasured.

    active, queued, free_slots: active + free_slots is slots; a sequence is queued only while no slot is free.
    queued_tokens: prompt tokens not prefilled yet. decode_rate: of the whole batch. tokens_per_s: generated over the
    last 10 s. step_seconds_total, session_seconds_total: time in ticks, and the part of it inside the session.
    median_step_s: of the last ticks, to tell a hang from slowness.
    """

    state: State
    slots: int
    active: int
    queued: int
    free_slots: int
    queued_tokens: int
    prefill_rate: float
    decode_rate: float
    tokens_per_s: float
    step_count: int
    median_step_s: float
    step_seconds_total: float
    session_seconds_total: float
    tokens_generated_total: int
    prompt_tokens_total: int
    kv_bytes: int
    model_memory_bytes: int
    load_time_s: float


def load_engine(
    folder: ModelFolder,
    *,
    slots: int,
    queue_limit: int,
    capacity: int | None = None,
    threads: int = 0,
    spinning: bool = True,
    provider: Provider = "auto",
) -> Engine:
    """Load everything of a model folder; blocks for seconds to minutes, so call it in a worker thread.

    Raises ModelFolderInvalid. The other options are load_session's.
    """
    started = time.monotonic()
    model = load_model(folder)
    session = load_session(
        folder, slots=slots, capacity=capacity, threads=threads, spinning=spinning, provider=provider
    )
    return Engine(model, session, queue_limit=queue_limit, load_time_s=time.monotonic() - started)


class Engine:
    """Generates for up to session.slots sequences together; `queue_limit` more may wait.

    Everything but the engine thread's own work is to be called on the trio thread. now: the clock of deadlines.
    """

    def __init__(
        self,
        model: LoadedModel,
        session: Session,
        *,
        queue_limit: int,
        now: Callable[[], float] = time.monotonic,
        load_time_s: float = 0.0,
    ) -> None:
        self.model = model
        self.now = now
        self._session = session
        self._queue_limit = queue_limit
        self._load_time_s = load_time_s
        self._state: State = LOADING
        self._is_running = False
        self._streams: dict[Sequence, EngineStream] = {}  # at most slots + queue_limit
        self._answer_tokens = float(ANSWER_TOKENS_DEFAULT)
        self._trio: trio.lowlevel.TrioToken | None = None
        self._thread_ended = trio.Event()
        # The lock of _wake guards these three. It is held for bookkeeping only.
        self._wake = threading.Condition()
        self._scheduler = Scheduler(session.slots, queue_limit)
        self._meter = Meter()
        self._is_stopping = False

    @property
    def fingerprint(self) -> str:
        return self.model.fingerprint

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer may have together on this engine."""
        return self._session.capacity

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the engine thread until cancelled; once. Readers of streams still open then get EngineStopped.

        A fault in a step does not end it: the state is `failed`, every stream gets EngineFault and submit() refuses.
        """
        self._trio = trio.lowlevel.current_trio_token()
        thread = threading.Thread(target=self._run_thread, name="engine", daemon=True)
        thread.start()
        self._state, self._is_running = READY, True
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            self._is_running = False
            with self._wake:
                self._is_stopping = True
                self._wake.notify()
            with trio.move_on_after(STOP_TIMEOUT_S, shield=True) as scope:
                await self._thread_ended.wait()
            if scope.cancelled_caught:
                logger.error("a step of the engine did not end; its thread is left behind")
            self._end_streams(EngineStopped("the engine was stopped before the answer was complete"))

    def submit(self, prompt_ids: SequenceOf[int], params: SamplingParams, deadline: float) -> EngineStream:
        """Queue a generation and return the stream of its events. deadline: on the engine's clock.

        Raises PromptTooLong, QueueFull, EngineFault after a fault, EngineStopped while run() does not run; nothing was
        queued then.
        """
        if self._state is FAILED:
            raise EngineFault("the engine has failed; the log says why")
        if not self._is_running:
            raise EngineStopped("the engine is not running")
        if len(prompt_ids) >= self.context_length:
            raise PromptTooLong(len(prompt_ids), self.context_length - 1)
        sequence = Sequence(
            prompt_ids,
            params,
            self.model.tokenizer.decoder(),
            eos_ids=self.model.eos_ids,
            capacity=self.context_length,
            deadline=deadline,
        )
        with self._wake:
            try:
                self._scheduler.submit(sequence)
            except QueueFull as exc:
                raise QueueFull(exc.queued, exc.limit, self._retry_after_s()) from None
            self._wake.notify()
        stream = self._streams[sequence] = EngineStream(lambda: self._close(sequence))
        return stream

    def statistics(self) -> EngineStatistics:
        now = self.now()
        with self._wake:
            load, meter = self._scheduler.load(), self._meter
            return EngineStatistics(
                state=self._state,
                slots=self._session.slots,
                active=load.active,
                queued=load.queued,
                free_slots=load.free_slots,
                queued_tokens=load.queued_tokens,
                prefill_rate=meter.prefill.per_s,
                decode_rate=meter.decode.per_s,
                tokens_per_s=meter.tokens_per_s(now),
                step_count=meter.steps,
                median_step_s=meter.median_step_s(),
                step_seconds_total=meter.step_seconds,
                session_seconds_total=meter.session_seconds,
                tokens_generated_total=meter.generated_tokens,
                prompt_tokens_total=meter.prompt_tokens,
                kv_bytes=self._session.kv_bytes,
                model_memory_bytes=self.model.weight_bytes + self._session.kv_bytes,
                load_time_s=self._load_time_s,
            )

    def _retry_after_s(self) -> float:
        """Until a place in the queue is free: with answers of L tokens, slots become free at decode rate / L."""
        rate = self._meter.decode.per_s
        wait_s = self._answer_tokens / rate if rate else RETRY_AFTER_MIN_S
        return min(max(wait_s, RETRY_AFTER_MIN_S), RETRY_AFTER_MAX_S)

    # On the trio thread, for streams and for what the engine thread posts.

    def _close(self, sequence: Sequence) -> None:
        """The reader of the sequence is gone: free its place. Any number of times."""
        if self._streams.pop(sequence, None) is not None:
            with self._wake:
                self._scheduler.cancel(sequence)
                self._wake.notify()

    def _deliver(self, outcomes: SequenceOf[Outcome]) -> None:
        for outcome in outcomes:
            stream = self._streams.get(outcome.sequence)
            if stream is None:
                continue  # closed by its reader after the step began
            if isinstance(outcome, Failed):
                del self._streams[outcome.sequence]
                stream.end(outcome.error)
            elif not stream.offer(outcome.event):
                self._close(outcome.sequence)
            elif outcome.event.finish_reason is not None:
                del self._streams[outcome.sequence]
                stream.end(None)
                self._answer_tokens += (outcome.event.completion_tokens - self._answer_tokens) / 16

    def _end_streams(self, error: EngineError) -> None:
        """End everything. The engine thread has ended, or will without another tick."""
        with self._wake:
            self._scheduler.abandon()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.end(error)

    def _fail(self) -> None:
        """What the engine thread posts as it ends with a fault."""
        self._state = FAILED
        self._end_streams(EngineFault("the engine failed in the middle of the answer"))

    # On the engine thread.

    def _run_thread(self) -> None:
        try:
            while self._tick():
                pass
        except Exception:  # whatever broke: readers must not wait for ever, and the node must say that it has failed
            logger.exception("a step of the engine failed")
            self._post(self._fail)
        finally:
            self._post(self._thread_ended.set)

    def _tick(self) -> bool:
        """Wait until there is something to do and do one tick of it. False once the engine is to stop."""
        with self._wake:
            plan = self._scheduler.plan(self.now())
            while not (plan.has_steps or plan.expired or self._is_stopping):
                self._wake.wait()
                plan = self._scheduler.plan(self.now())
            if self._is_stopping:
                return False
        outcomes: list[Outcome] = list(plan.expired)
        if plan.has_steps:
            outcomes += self._execute(plan)
        if outcomes:
            self._post(self._deliver, outcomes)
        return True

    def _execute(self, plan: Plan) -> list[Outcome]:
        started = time.perf_counter()
        for move in plan.moves:
            self._session.copy(move.source, move.target, move.length)
        tokens: list[Sampled] = []
        decode_s = prefill_s = 0.0
        if plan.decode:
            tokens, decode_s = self._decode(plan.decode)
        first_token = None
        if plan.prefill is not None:
            first_token, prefill_s = self._prefill(plan.prefill)
        with self._wake:
            outcomes = self._scheduler.commit(plan, tokens, first_token)
            meter = self._meter
            if plan.decode:
                meter.decoded(len(plan.decode), decode_s)
            if plan.prefill is not None:
                meter.prefilled(len(plan.prefill.token_ids), prefill_s)
            generated = sum(len(outcome.event.token_ids) for outcome in outcomes if isinstance(outcome, Progress))
            meter.stepped(generated, time.perf_counter() - started, self.now())
        return outcomes

    def _decode(self, batch: SequenceOf[Sequence]) -> tuple[list[Sampled], float]:
        """One token per sequence, and the seconds that the session took."""
        kv, count = self._scheduler.kv, len(batch)
        started = time.perf_counter()
        logits = self._session.decode(kv.next_ids[:count], kv.lengths[:count])
        seconds = time.perf_counter() - started
        return sample(logits, [sequence.sampling for sequence in batch]), seconds

    def _prefill(self, chunk: PrefillChunk) -> tuple[Sampled | None, float]:
        """The answer's first token after the last chunk, and the seconds that the session took."""
        started = time.perf_counter()
        logits = self._session.prefill(chunk.slot, np.asarray(chunk.token_ids, np.int64), chunk.start)
        seconds = time.perf_counter() - started
        if not chunk.is_last:
            return None, seconds
        return sample(logits[None], [chunk.sequence.sampling])[0], seconds

    def _post(self, call: Callable[..., object], *args: object) -> None:
        assert self._trio is not None
        with suppress(trio.RunFinishedError):  # nobody is left to read
            self._trio.run_sync_soon(call, *args)
