"""The engine of one embedding model: what trio tasks ask of it.

Everything here is the trio thread's. The engine's thread (nodes.engine.embedding_thread) runs the model on steps that
nodes.engine.embedding_queue makes of all requests that wait.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import trio

from nodes.engine.devices import Provider
from nodes.engine.embedding_folder import EmbeddingFolder, LoadedEmbeddingModel, load_embedding_model
from nodes.engine.embedding_queue import EmbeddingQueue, EmbeddingRequest, IntArray
from nodes.engine.embedding_session import load_embedding_session
from nodes.engine.embedding_thread import Done, EmbeddingSession, EmbeddingThread
from nodes.engine.engine import RETRY_AFTER_MAX_S, RETRY_AFTER_MIN_S
from nodes.engine.engine_statistics import EngineStatistics
from nodes.engine.errors import (
    DeadlinePassed,
    EngineError,
    EngineFault,
    EngineStopped,
    InputTooLong,
    QueueFull,
    TokenUnknown,
)
from nodes.engine.estimate import PREFILL_RATE_DEFAULT, FirstTokenEstimate
from nodes.engine.meter import Meter
from nodes.engine.pooling import FloatArray
from nodes.engine.step_watch import StepWatch

logger = logging.getLogger(__name__)


def load_embedding_engine(
    folder: EmbeddingFolder,
    *,
    queue_limit: int,
    threads: int = 0,
    spinning: bool = True,
    provider: Provider = "auto",
    memory_limit_bytes: int | None = None,
    device_index: int = 0,
) -> EmbeddingEngine:
    """Load everything of a folder; blocks for seconds, so call it in a worker thread. Raises ModelFolderInvalid."""
    started = time.monotonic()
    model = load_embedding_model(folder)
    session = load_embedding_session(
        folder,
        threads=threads,
        spinning=spinning,
        provider=provider,
        memory_limit_bytes=memory_limit_bytes,
        device_index=device_index,
    )
    return EmbeddingEngine(model, session, queue_limit=queue_limit, load_time_s=time.monotonic() - started)


@dataclass(slots=True)
class _Pending:
    """vectors: float32 [inputs, dimensions], filled step by step. error: why some are not there."""

    vectors: FloatArray
    has_ended: trio.Event = field(default_factory=trio.Event)
    error: EngineError | None = None

    def end(self, error: EngineError | None) -> None:
        self.error = error
        self.has_ended.set()


class EmbeddingEngine:
    """Computes embeddings for requests that come together in common steps; `queue_limit` requests may wait.

    To be called on the trio thread. now: the clock of deadlines.
    """

    def __init__(
        self,
        model: LoadedEmbeddingModel,
        session: EmbeddingSession,
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
        self._pending: dict[EmbeddingRequest, _Pending] = {}  # at most what the queue lets wait, and a step or two
        self._queue = EmbeddingQueue(max(1, queue_limit), session.rows_max, session.step_tokens)
        self._thread = EmbeddingThread(session, self._queue, now)
        self._wake = self._thread.wake
        self._meter = Meter()
        self._watch = StepWatch(self._thread, median_step_s=self._meter.median_step_s, now=now, on_stuck=self._end_all)

    @property
    def fingerprint(self) -> str:
        return self.model.fingerprint

    @property
    def context_length(self) -> int:
        """Tokens of the longest input."""
        return self.model.context_length

    @property
    def dimensions(self) -> int:
        """Of a vector."""
        return self._session.dimensions

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the engine's thread until cancelled; once. Requests not answered by then end with EngineStopped.

        States are as nodes.engine.engine.Engine.run says."""
        self._thread.start(self._deliver, self._fail)
        try:
            await self._watch.run(task_status=task_status)
        finally:
            self._end_all(EngineStopped("the engine was stopped before the embeddings were there"))

    def checked(self, inputs: Sequence[Sequence[int]]) -> list[IntArray]:
        """Inputs of token ids as embed() takes them. In any thread. Raises InputTooLong, TokenUnknown."""
        checked = []
        for ids in inputs:
            assert len(ids), "an input without tokens"
            if len(ids) > self.context_length:
                raise InputTooLong(len(ids), self.context_length)
            if not (min(ids) >= 0 and max(ids) < self.model.vocabulary_size):
                raise TokenUnknown(min(ids) if min(ids) < 0 else max(ids), self.model.vocabulary_size)
            checked.append(np.asarray(ids, np.int64))
        return checked

    async def embed(
        self, inputs: Sequence[IntArray], deadline: float, *, fairness_id: str = "", weight: float = 1.0
    ) -> FloatArray:
        """float32 [inputs, dimensions] of what checked() gave, in their order. deadline: on the engine's clock.
        fairness_id: whose request; weight: its share in proportion to others'. Cancelling it frees its places.

        Raises QueueFull, EngineFault when the engine has failed or is stuck, EngineStopped while run() does not run,
        with nothing queued; then EngineFault, EngineStopped and DeadlinePassed."""
        self._watch.check()
        request = EmbeddingRequest(inputs, fairness_id, weight)
        pending = _Pending(np.empty((len(inputs), self.dimensions), np.float32))
        with self._wake:
            try:
                self._queue.submit(request)
            except QueueFull as exc:
                raise QueueFull(exc.queued, exc.limit, self._retry_after_s()) from None
            self._wake.notify()
        self._pending[request] = pending
        try:
            with trio.move_on_after(max(0.0, deadline - self.now())):
                await pending.has_ended.wait()
        finally:
            self._forget(request)
        if not pending.has_ended.is_set():
            raise DeadlinePassed("the deadline passed before the embeddings were there")
        if pending.error is not None:
            raise pending.error
        return pending.vectors

    def statistics(self) -> EngineStatistics:
        """As of a language model, with its inputs for prompts: slots are the inputs of one step, prefill_rate is the
        tokens per second, decode_rate the requests per second, each of which is an answer of one token."""
        meter = self._meter
        with self._wake:
            queued, queued_tokens = len(self._queue), self._queue.tokens
        slots = self._session.rows_max
        active = min(slots, max(0, len(self._pending) - queued))
        return EngineStatistics(
            state=self._watch.state,
            slots=slots,
            active=active,
            queued=queued,
            free_slots=slots - active,
            queued_tokens=queued_tokens,
            prefill_rate=meter.prefill.per_s,
            decode_rate=meter.decode.per_s,
            step_count=meter.steps,
            median_step_s=meter.median_step_s(),
            step_seconds_total=meter.step_seconds,
            session_seconds_total=meter.session_seconds,
            prompt_tokens_total=meter.prompt_tokens,
            model_memory_bytes=self.model.weight_bytes,
            load_time_s=self._load_time_s,
            first_token=FirstTokenEstimate(self._wait_s(queued_tokens), 1 / self._rate()),
            first_token_error=0.0,
            answer_tokens=1.0,
            step_faults_total=self._thread.faults_total,
            # Nothing is generated, and nothing is kept from one request to the next.
            tokens_per_s=0.0,
            tokens_generated_total=0,
            kv_bytes=0,
            cache_queries_total=0,
            cache_hits_total=0,
            cache_query_tokens_total=0,
            cache_hit_tokens_total=0,
        )

    def _rate(self) -> float:
        """Tokens per second."""
        return self._meter.prefill.per_s or PREFILL_RATE_DEFAULT

    def _wait_s(self, queued_tokens: int) -> float:
        """Until a request that comes now begins: what waits before it, and half of the step in progress."""
        begun_s = self._meter.median_step_s() / 2 if self._thread.step_began is not None else 0.0
        return begun_s + queued_tokens / self._rate()

    def _retry_after_s(self) -> float:
        """Until a place in the queue is free: the wait of a whole queue, shared by those who wait in it."""
        wait_s = self._wait_s(self._queue.tokens) / max(self._queue_limit, 1)
        return min(max(wait_s, RETRY_AFTER_MIN_S), RETRY_AFTER_MAX_S)

    def _forget(self, request: EmbeddingRequest) -> None:
        """Any number of times."""
        if self._pending.pop(request, None) is not None:
            with self._wake:
                self._queue.cancel(request)

    # What the engine's thread posts.

    def _deliver(self, done: Done) -> None:
        completed = 0
        for row, (request, index) in enumerate(done.step.rows):
            pending = self._pending.get(request)
            if pending is None:
                continue  # nobody waits for it any more
            if isinstance(done.vectors, EngineFault):
                self._end(request, done.vectors)
                continue
            vector = done.vectors[row]
            if not np.isfinite(vector).all():
                self._end(request, EngineFault("the model gave numbers that are none"))
                continue
            pending.vectors[index] = vector
            request.unfinished -= 1
            if not request.unfinished:
                completed += 1
                self._end(request, None)
        if not isinstance(done.vectors, EngineFault):
            self._meter.prefilled(done.step.tokens, done.seconds)
            self._meter.decode.add(completed, done.seconds)
            self._meter.stepped(0, done.seconds, done.ended)

    def _end(self, request: EmbeddingRequest, error: EngineError | None) -> None:
        pending = self._pending[request]
        self._forget(request)
        pending.end(error)

    def _end_all(self, error: EngineError) -> None:
        for request in list(self._pending):
            self._end(request, error)

    def _fail(self) -> None:
        """What the thread posts as it ends with a fault."""
        self._watch.fail()
        self._end_all(EngineFault("the engine failed while it computed these embeddings"))
