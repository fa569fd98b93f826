"""The engine of one model: what trio tasks ask of it, and the streams by which they read.

Everything here is the trio thread's. The engine thread (nodes.engine.engine_thread) runs the model, and posts what came
of each tick; here that becomes text, events and figures, while the model runs again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Literal

import trio

from nodes.engine.engine_statistics import EngineStatistics, KvRows
from nodes.engine.engine_thread import EngineThread, Tick
from nodes.engine.errors import EngineError, EngineFault, EngineStopped, PromptTooLong, QueueFull, TokenUnknown
from nodes.engine.estimate import FirstTokenEstimate, estimate_first_token
from nodes.engine.executor import Session
from nodes.engine.grammar import GrammarCompiler, GrammarMatcher
from nodes.engine.meter import Meter
from nodes.engine.model_loader import LoadedModel, ModelFolder, load_model
from nodes.engine.sampling import GrammarSpec, Matcher, SamplingParams
from nodes.engine.scheduler import Failed, Outcome, Scheduler, text_fault
from nodes.engine.sequence import Sequence
from nodes.engine.session import Provider, load_session
from nodes.engine.step_watch import StepWatch
from nodes.engine.stream import EngineStream

logger = logging.getLogger(__name__)

Resume = Literal["auto", "prefill", "replay"]

RETRY_AFTER_MIN_S = 1.0
RETRY_AFTER_MAX_S = 60.0


def load_engine(
    folder: ModelFolder,
    *,
    slots: int | None = None,
    queue_limit: int,
    capacity: int | None = None,
    threads: int = 0,
    spinning: bool = True,
    provider: Provider = "auto",
    memory_limit_bytes: int | None = None,
    device_index: int = 0,
) -> Engine:
    """Load everything of a model folder; blocks for seconds to minutes, so call it in a worker thread.

    Raises ModelFolderInvalid. The other options are load_session's.
    """
    started = time.monotonic()
    model = load_model(folder)
    session, served = load_session(
        folder,
        slots=slots,
        capacity=capacity,
        threads=threads,
        spinning=spinning,
        provider=provider,
        memory_limit_bytes=memory_limit_bytes,
        device_index=device_index,
    )
    if served is not folder:
        model = load_model(served)
    return Engine(model, session, queue_limit=queue_limit, load_time_s=time.monotonic() - started)


class Engine:
    """Generates for up to session.slots sequences together; `queue_limit` more may wait, and RESUMED_PER_SLOT a slot of
    those that another engine has begun, which go first.

    To be called on the trio thread. now: the clock of deadlines.
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
        self._streams: dict[Sequence, EngineStream] = {}  # at most slots + what the scheduler lets wait
        self._estimates: dict[Sequence, tuple[float, float]] = {}  # until the first token: when submitted, estimate
        self._scheduler = Scheduler(
            session.slots, queue_limit, mixes_rows=session.is_exact, chunk_tokens_max=session.prefill_tokens_max
        )
        self._thread = EngineThread(session, self._scheduler, now)
        self._wake = self._thread.wake  # its lock guards the scheduler, and is held for bookkeeping only
        self._grammars = GrammarCompiler(model.tokenizer.to_json(), session.vocabulary_size, model.eos_ids)
        self._meter = Meter()
        self._watch = StepWatch(
            self._thread, median_step_s=self._meter.median_step_s, now=now, on_stuck=self._end_stuck
        )

    @property
    def fingerprint(self) -> str:
        return self.model.fingerprint

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer may have together on this engine."""
        return self._session.capacity

    @property
    def vocabulary_size(self) -> int:
        """Token ids are below it."""
        return self._session.vocabulary_size

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the engine thread until cancelled; once. Readers of streams still open then get EngineStopped.

        A step that breaks ends its own requests with EngineFault. After FAULTS_MAX in a row the state is `failed`,
        every stream gets EngineFault and submit() refuses. So it is, for as long as it takes, when a step does not
        return: the state is then `stuck`.
        """
        self._thread.start(self._deliver, self._fail)
        try:
            await self._watch.run(task_status=task_status)
        finally:
            self._end_streams(EngineStopped("the engine was stopped before the answer was complete"))

    def submit(
        self,
        prompt_ids: SequenceOf[int],
        params: SamplingParams,
        deadline: float,
        *,
        generated_ids: SequenceOf[int] = (),
        resume: Resume = "auto",
        fairness_id: str = "",
        weight: float = 1.0,
        text_blocks: tuple[int, ...] = (),
        matcher: Matcher | None = None,
    ) -> EngineStream:
        """Queue a generation and return the stream of its events. deadline: on the engine's clock.

        generated_ids: what another engine of the same model has generated of the answer; the stream goes on at the next
        token. resume: how their rows are made. By prefill: fast. By replay, one decode step each: gives the very tokens
        that would have come without the interruption, also in quantised models. auto: replay where that matters, in a
        model that is not exact and for requests that are greedy or seeded. fairness_id: whose request; weight: its
        share in proportion to others'. text_blocks: the conversation's, from prefix_digest, under which its cached rows
        are told of. matcher: where params has a grammar, from compile_grammar().

        Raises PromptTooLong, TokenUnknown, QueueFull, EngineFault when it has failed or is stuck, EngineStopped while
        run() does not run; nothing was queued then.
        """
        self._watch.check()
        if len(prompt_ids) >= self.context_length or len(prompt_ids) + len(generated_ids) > self.context_length:
            raise PromptTooLong(len(prompt_ids) + len(generated_ids), self.context_length - 1)
        for ids in (prompt_ids, generated_ids):
            if ids and not (min(ids) >= 0 and max(ids) < self._session.vocabulary_size):
                raise TokenUnknown(min(ids) if min(ids) < 0 else max(ids), self._session.vocabulary_size)
        sequence = Sequence(
            prompt_ids,
            params,
            self.model.tokenizer.decoder(),
            eos_ids=self.model.eos_ids,
            capacity=self.context_length,
            deadline=deadline,
            generated_ids=generated_ids,
            replays=bool(generated_ids) and self._is_replayed(params, resume),
            fairness_id=fairness_id,
            weight=weight,
            text_blocks=text_blocks,
            matcher=matcher,
        )
        if (error := sequence.sampling.error) is not None:
            raise EngineFault(error)
        stream = EngineStream(lambda: self._close(sequence), submitted_at=self.now())
        if generated_ids and (end := sequence.ended_before()) is not None:
            stream.offer(end)
            stream.end(None)
            return stream
        with self._wake:
            estimate = self._estimate_first_token()
            found = self._scheduler.kv.match(sequence.prefill_ids).length
            try:
                displaced = self._scheduler.submit(sequence)
            except QueueFull as exc:
                raise QueueFull(exc.queued, exc.limit, self._retry_after_s(estimate)) from None
            self._wake.notify()
        if displaced is not None:
            full = QueueFull(self._queue_limit, self._queue_limit, self._retry_after_s(estimate))
            self._deliver(Tick([Failed(displaced, full)]))
        self._streams[sequence] = stream
        if not generated_ids:
            self._estimates[sequence] = (self.now(), estimate.seconds(len(prompt_ids) - found))
        return stream

    def compile_grammar(self, spec: GrammarSpec) -> GrammarMatcher:
        """A fresh matcher for one submit(). May take a second: call it in a worker thread. Raises GrammarInvalid, and
        GrammarUnavailable for a tokenizer that grammars do not work with."""
        return self._grammars.compile(spec)

    def cached_conversations(self) -> list[tuple[int, ...]]:
        """For each conversation whose rows are in a slot, the names (nodes.engine.prefix_digest) of its blocks that are
        cached, the first block first. Those in use come first, then the most recently used; at most one a slot."""
        with self._wake:
            return self._scheduler.kv.conversations()

    def kv_rows(self) -> KvRows:
        """For scrapes: it walks over the slots, which statistics(), asked for each request, does not."""
        with self._wake:
            used, cached = self._scheduler.kv.rows()
        return KvRows(self._session.slots * self._session.capacity, used, cached)

    def statistics(self) -> EngineStatistics:
        now = self.now()
        with self._wake:
            load, meter = self._scheduler.load(), self._meter
            return EngineStatistics(
                state=self._watch.state,
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
                first_token=self._estimate_first_token(),
                first_token_error=meter.estimate_error(),
                answer_tokens=meter.answer_tokens,
                cache_queries_total=self._scheduler.cache.queries,
                cache_hits_total=self._scheduler.cache.hits,
                cache_query_tokens_total=self._scheduler.cache.query_tokens,
                cache_hit_tokens_total=self._scheduler.cache.hit_tokens,
                step_faults_total=self._thread.faults_total,
            )

    def _is_replayed(self, params: SamplingParams, resume: Resume) -> bool:
        if resume == "auto":
            return params.is_reproducible and not self._session.is_exact
        return resume == "replay"

    def _estimate_first_token(self) -> FirstTokenEstimate:
        """With the scheduler's lock held."""
        load, meter = self._scheduler.load(), self._meter
        remaining = self._scheduler.remaining_tokens(meter.answer_tokens)
        return estimate_first_token(
            prefill_rate=meter.prefill.per_s,
            step_s=meter.decode_step_s(len(remaining)),
            answer_tokens=meter.answer_tokens,
            slots=self._session.slots,
            queued=max(0, load.active + load.queued - len(remaining)),
            queued_tokens=load.queued_tokens,
            remaining_tokens=remaining,
        )

    def _retry_after_s(self, estimate: FirstTokenEstimate) -> float:
        """Until a place in the queue is free: the wait of a whole queue, shared by those who wait in it."""
        wait_s = estimate.wait_s / max(self._queue_limit, 1)
        return min(max(wait_s, RETRY_AFTER_MIN_S), RETRY_AFTER_MAX_S)

    # For streams, and for what the engine thread posts.

    def _close(self, sequence: Sequence) -> None:
        """The reader of the sequence is gone: free its place. Any number of times."""
        self._estimates.pop(sequence, None)
        stream = self._streams.pop(sequence, None)
        if stream is not None:
            self._note_placed(stream, sequence)
            with self._wake:
                self._scheduler.cancel(sequence)
                self._wake.notify()

    def _deliver(self, tick: Tick) -> None:
        if tick.step_s is not None:
            self._measure(tick)
        for outcome in tick.outcomes:
            sequence = outcome.sequence
            stream = self._streams.get(sequence)
            if stream is None:
                continue  # closed by its reader after the step began
            estimate = self._estimates.pop(sequence, None)
            if isinstance(outcome, Failed):
                del self._streams[sequence]
                self._note_placed(stream, sequence)
                stream.ended_at = self.now()
                stream.end(outcome.error)
                continue
            if stream.first_event_at is None:
                stream.first_event_at = self.now()
                stream.queued_s = max(0.0, sequence.placed_at - stream.submitted_at)
            if estimate is not None:
                submitted, estimated_s = estimate
                self._meter.first_token(estimated_s, self.now() - submitted)
            try:
                event = outcome.event()
            except BaseException as exc:  # of the tokenizer, whose panics are no Exception: one request's fault
                self._close(sequence)
                stream.end(text_fault(exc))
                continue
            if not stream.offer(event):
                self._close(sequence)
            elif event.finish_reason is not None:
                del self._streams[sequence]
                stream.ended_at = self.now()
                stream.end(None)
                self._meter.answered(event.completion_tokens)

    def _note_placed(self, stream: EngineStream, sequence: Sequence) -> None:
        """How long one that ends without an event waited for its slot, if it got one."""
        if stream.queued_s is None and sequence.placed_at > 0.0:
            stream.queued_s = max(0.0, sequence.placed_at - stream.submitted_at)

    def _measure(self, tick: Tick) -> None:
        assert tick.step_s is not None
        if tick.decoded:
            self._meter.decoded(tick.decoded, tick.decode_s)
        if tick.prefilled:
            self._meter.prefilled(tick.prefilled, tick.prefill_s)
        self._meter.stepped(_generated(tick.outcomes), tick.step_s, tick.ended)

    def _end_streams(self, error: EngineError) -> None:
        """End everything. The engine thread has ended, or will without another tick."""
        with self._wake:
            self._scheduler.abandon()
        streams, self._streams = self._streams, {}
        self._estimates.clear()
        for sequence, stream in streams.items():
            self._note_placed(stream, sequence)
            stream.end(error)

    def _end_stuck(self, error: EngineFault) -> None:
        """End everything, and leave the scheduler to the thread, which may go on."""
        for sequence, stream in list(self._streams.items()):
            self._close(sequence)
            stream.end(error)

    def _fail(self) -> None:
        """What the engine thread posts as it ends with a fault."""
        self._watch.fail()
        self._end_streams(EngineFault("the engine failed in the middle of the answer"))


def _generated(outcomes: SequenceOf[Outcome]) -> int:
    """Tokens that reached their sequences; one that ends an answer is not part of it."""
    return sum(not isinstance(outcome, Failed) and outcome.token_id is not None for outcome in outcomes)
