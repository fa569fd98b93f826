"""One model being served: a thread that owns session and KV memory, and the doors into it from the trio thread.

Commands go in through a queue that the thread empties before each step; all events of a step come back with one wake-up of
the trio thread. Nothing else crosses: the scheduler and every Sequence belong to the engine thread while it runs.
"""

from __future__ import annotations

import logging
import statistics as stats
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import trio

from nodes.engine.model_loader import ModelFolder
from nodes.engine.sampler import Logits, sample
from nodes.engine.scheduler import PrefillChunk, Scheduler
from nodes.engine.sequence import EngineEvent, SamplingParams, Sequence
from nodes.engine.session import OrtSession, Provider, Session

logger = logging.getLogger(__name__)

READY = "ready"
FAILED = "failed"

# Events that wait for a reader. A reader this far behind does not read; the slot is worth more than its stream.
EVENTS_WAITING_MAX = 4096
RATE_WINDOW_S = 10
STEPS_REMEMBERED = 64  # for the median step
RATE_WEIGHT = 0.1  # of the newest step in the measured rates
ANSWER_TOKENS_GUESS = 256  # how long an answer is thought to be when the wait is estimated
RETRY_AFTER_MAX_S = 60.0
STOP_TIMEOUT_S = 30.0  # longer than any step
WARM_UP_TOKENS = 64


class EngineError(Exception):
    """Root of what an engine raises."""


class QueueFull(EngineError):
    """retry_after_s: estimate of when a place is free."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class PromptTooLong(EngineError):
    """The prompt leaves no room for an answer in a slot."""


class EngineFault(EngineError):
    """The engine has failed, or stops; the generation is lost."""


class EngineOverflow(EngineError):
    """The reader of this stream did not keep up, and its generation was ended."""


class DeadlinePassed(EngineError):
    """The generation's deadline passed."""


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """Now, and totals since the start. Rates are tokens a second, measured on the run; decode_rate is the whole batch's."""

    state: str
    slots: int
    active: int
    queued: int
    free_slots: int
    queued_tokens: int  # prompt tokens not yet prefilled
    prefill_rate: float
    decode_rate: float
    step_count: int
    step_median_s: float
    tokens_per_s: float  # generated over the last 10 s
    tokens_generated: int
    prompt_tokens: int
    kv_bytes: int
    model_memory_bytes: int
    load_time_s: float


_Outcome = EngineEvent | EngineError


class EngineStream(trio.abc.ReceiveChannel[EngineEvent]):
    """The events of one generation. Ends after the one with a finish_reason. Closing it frees the slot within one step."""

    def __init__(self, engine: Engine, sequence: Sequence) -> None:
        self._engine = engine
        self._sequence = sequence
        self._send, self._receive = trio.open_memory_channel[_Outcome](EVENTS_WAITING_MAX)
        self.is_done = False  # nothing more will be put

    async def receive(self) -> EngineEvent:
        """Raises trio.EndOfChannel, EngineFault, EngineOverflow, DeadlinePassed."""
        outcome = await self._receive.receive()
        if isinstance(outcome, EngineError):
            raise outcome
        return outcome

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """What aclose() does, without its checkpoint. Any number of times."""
        self._receive.close()
        if not self.is_done:
            self._engine.cancel(self._sequence)

    def put(self, outcome: _Outcome) -> bool:
        """On the trio thread. False when the reader has fallen too far behind; then the stream is over."""
        is_last = isinstance(outcome, EngineError) or outcome.finish_reason is not None
        is_taken = True
        try:
            self._send.send_nowait(outcome)
        except trio.BrokenResourceError:
            pass  # closed by its reader, who has cancelled the sequence
        except trio.WouldBlock:
            is_taken = False
        if is_last or not is_taken:
            self.is_done = True
            self._send.close()
        return is_taken


class Engine:
    """One model. Made by load_engine; submit() works while run() runs."""

    def __init__(
        self,
        folder: ModelFolder,
        session: Session,
        *,
        queue_limit: int,
        fingerprint: str = "",
        load_time_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.context_length = session.capacity
        self._session = session
        self._queue_limit = queue_limit
        self._load_time_s = load_time_s
        self._clock = clock
        self._model_bytes = folder.weight_bytes()
        # Of the trio thread.
        self._streams: dict[Sequence, EngineStream] = {}
        self._trio_token: trio.lowlevel.TrioToken | None = None
        # Shared, under the condition.
        self._wake = threading.Condition()
        self._submitted: deque[Sequence] = deque()  # bounded by submit(), which alone appends
        self._cancelled: deque[Sequence] = deque()  # at most one entry a stream
        self._is_stopping = False
        # Of the engine thread; others read single numbers.
        self._scheduler = Scheduler(session.slots)
        self._state = READY
        self._prefill_rate = self._decode_rate = 0.0
        self._step_count = self._tokens_generated = self._prompt_tokens = 0
        self._step_seconds: deque[float] = deque(maxlen=STEPS_REMEMBERED)
        self._recent: deque[tuple[int, int]] = deque(maxlen=RATE_WINDOW_S + 2)  # (second, tokens generated in it)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Runs the engine thread until cancelled; then the step in progress is awaited and open streams end in a fault."""
        self._trio_token = trio.lowlevel.current_trio_token()
        thread = threading.Thread(target=self._work, name=f"engine-{self.folder.path.name}", daemon=True)
        thread.start()
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            with self._wake:
                self._is_stopping = True
                self._wake.notify()
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(thread.join, STOP_TIMEOUT_S)
            self._end_all(EngineFault("the engine has stopped"))

    def submit(self, prompt: tuple[int, ...], params: SamplingParams, deadline_s: float) -> EngineStream:
        """Queue a generation. prompt: at least one token id. max_tokens is lowered to what a slot has room for.

        Raises QueueFull, PromptTooLong, EngineFault; nothing is queued then.
        """
        if self._state == FAILED or self._is_stopping:
            raise EngineFault("the engine has failed; restart the node")
        room = self.context_length - len(prompt)
        if room < 1:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens, which leaves no room for an answer in {self.context_length}"
            )
        limit = self._session.slots + self._queue_limit
        if len(self._streams) >= limit:
            raise QueueFull(f"{len(self._streams)} generations run or wait here, the limit is {limit}", self._wait_s())
        capped = SamplingParams(
            params.temperature, params.top_p, params.seed, min(params.max_tokens, room), params.stop, params.ignore_eos
        )
        decoder = self.folder.tokenizer.stream()
        sequence = Sequence(prompt, capped, decoder, self.folder.eos_token_ids, self._clock() + deadline_s)
        stream = self._streams[sequence] = EngineStream(self, sequence)
        with self._wake:
            self._submitted.append(sequence)
            self._wake.notify()
        return stream

    def cancel(self, sequence: Sequence) -> None:
        """The stream of this sequence is closed; free its slot before the next step."""
        stream = self._streams.pop(sequence, None)
        if stream is not None:
            stream.is_done = True
            with self._wake:
                self._cancelled.append(sequence)
                self._wake.notify()

    def statistics(self) -> EngineStatistics:
        """A snapshot from the trio thread; the engine thread may be in the middle of a step."""
        active = min(self._scheduler.kv.active, len(self._streams))
        return EngineStatistics(
            state=self._state,
            slots=self._session.slots,
            active=active,
            queued=len(self._streams) - active,
            free_slots=self._session.slots - active,
            queued_tokens=sum(len(s.prompt) - s.prefilled for s in self._streams),
            prefill_rate=self._prefill_rate,
            decode_rate=self._decode_rate,
            step_count=self._step_count,
            step_median_s=stats.median(self._step_seconds) if self._step_seconds else 0.0,
            tokens_per_s=self._recent_tokens() / RATE_WINDOW_S,
            tokens_generated=self._tokens_generated,
            prompt_tokens=self._prompt_tokens,
            kv_bytes=self._session.kv_bytes,
            model_memory_bytes=self._model_bytes + self._session.kv_bytes,
            load_time_s=self._load_time_s,
        )

    def _wait_s(self) -> float:
        """Until the next of all that run or wait is through, at the rate at which slots become free."""
        rate = self._decode_rate / ANSWER_TOKENS_GUESS
        return min(RETRY_AFTER_MAX_S, max(1.0, 1 / rate)) if rate else 1.0

    def _recent_tokens(self) -> int:
        now = int(self._clock())
        return sum(tokens for second, tokens in tuple(self._recent) if now - RATE_WINDOW_S <= second < now + 1)

    # On the trio thread, called from the engine thread with run_sync_soon.

    def _deliver(self, outcomes: list[tuple[Sequence, _Outcome]]) -> None:
        for sequence, outcome in outcomes:
            stream = self._streams.get(sequence)
            if stream is None:
                continue  # cancelled meanwhile
            if not stream.put(outcome):
                logger.warning("a reader fell behind and lost its stream", extra={"model": self.folder.path.name})
                self.cancel(sequence)
            elif stream.is_done:
                del self._streams[sequence]

    def _end_all(self, error: EngineError) -> None:
        for stream in self._streams.values():
            stream.put(error)
        self._streams.clear()

    # On the engine thread.

    def _work(self) -> None:
        try:
            while self._take_commands():
                self._tick()
        except Exception as exc:  # of the runtime, of any kind: the engine cannot go on, the node can say so
            self._state = FAILED
            logger.exception("the engine has failed", extra={"model": self.folder.path.name})
            fault = EngineFault(f"the engine failed: {type(exc).__name__}")
            self._post(lambda: self._end_all(fault))

    def _take_commands(self) -> bool:
        """Wait while there is nothing to do, then take what was asked for. False at the end."""
        scheduler = self._scheduler
        with self._wake:
            while not (self._submitted or self._cancelled or self._is_stopping or scheduler.has_work()):
                self._wake.wait()
            if self._is_stopping:
                return False
            # Submissions first: a sequence may have been submitted and cancelled since the last look.
            while self._submitted:
                scheduler.submit(self._submitted.popleft())
            while self._cancelled:
                scheduler.remove(self._cancelled.popleft())
        return True

    def _tick(self) -> None:
        plan = self._scheduler.plan(self._clock())
        outcomes: list[tuple[Sequence, _Outcome]] = [
            (sequence, DeadlinePassed("the generation's deadline has passed")) for sequence in plan.expired
        ]
        for move in plan.moves:
            self._session.move(move)
        if plan.decode:
            outcomes += self._decode(plan.decode)
        if plan.prefill:
            outcomes += self._prefill(plan.prefill)
        if outcomes:
            self._post(lambda: self._deliver(outcomes))

    def _decode(self, rows: list[Sequence]) -> list[tuple[Sequence, _Outcome]]:
        started = time.perf_counter()
        token_ids = np.array([sequence.generated[-1] for sequence in rows], np.int64)
        lengths = np.array([sequence.length for sequence in rows], np.int64)
        logits = self._session.decode(token_ids, lengths)
        outcomes = self._accept(rows, logits)
        seconds = time.perf_counter() - started
        self._step_count += 1
        self._step_seconds.append(seconds)
        self._decode_rate = _smoothed(self._decode_rate, len(rows) / seconds)
        return outcomes

    def _prefill(self, chunk: PrefillChunk) -> list[tuple[Sequence, _Outcome]]:
        started = time.perf_counter()
        sequence = chunk.sequence
        token_ids = np.array(sequence.prompt[chunk.start : chunk.stop], np.int64)
        logits = self._session.prefill(chunk.slot, token_ids, chunk.start)
        self._scheduler.commit_prefill(chunk)
        self._step_count += 1
        self._prompt_tokens += len(token_ids)
        self._prefill_rate = _smoothed(self._prefill_rate, len(token_ids) / (time.perf_counter() - started))
        return self._accept([sequence], logits[None]) if sequence.is_prefilled else []

    def _accept(self, rows: list[Sequence], logits: Logits) -> list[tuple[Sequence, _Outcome]]:
        """Sample a token for each row; those it finishes leave their slots."""
        chosen = sample(logits, [s.params for s in rows], [s.position for s in rows])
        events = [(sequence, sequence.accept(token_id)) for sequence, token_id in zip(rows, chosen, strict=True)]
        # Only when all have accepted: a move is as long as its sequence, and that has just grown.
        for sequence, event in events:
            if event.finish_reason is not None:
                self._scheduler.remove(sequence)
        outcomes: list[tuple[Sequence, _Outcome]] = [*events]
        self._tokens_generated += len(rows)
        second = int(self._clock())
        if self._recent and self._recent[-1][0] == second:
            self._recent[-1] = (second, self._recent[-1][1] + len(rows))
        else:
            self._recent.append((second, len(rows)))
        return outcomes

    def _post(self, call: Callable[[], object]) -> None:
        assert self._trio_token is not None
        try:
            self._trio_token.run_sync_soon(call)
        except trio.RunFinishedError:
            self._is_stopping = True  # the node is gone, and with it every reader


def _smoothed(rate: float, newest: float) -> float:
    return newest if rate == 0.0 else rate + RATE_WEIGHT * (newest - rate)


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
    """Load the graph, warm it up, and measure its first rates. Takes seconds; for a worker thread.

    Raises ModelFolderInvalid.
    """
    started = time.monotonic()
    fingerprint = folder.fingerprint()
    session = OrtSession(folder, slots=slots, capacity=capacity, threads=threads, spinning=spinning, provider=provider)
    _warm_up(session)
    seconds = time.monotonic() - started
    logger.info(
        "model loaded",
        extra={
            "model": folder.path.name,
            "fingerprint": fingerprint,
            "provider": session.provider,
            "capacity": session.capacity,
            "kv_bytes": session.kv_bytes,
            "duration_ms": round(seconds * 1000),
        },
    )
    return Engine(folder, session, queue_limit=queue_limit, fingerprint=fingerprint, load_time_s=seconds)


def _warm_up(session: OrtSession) -> None:
    """The first runs of a graph allocate; no client should wait for that."""
    tokens = np.zeros(min(WARM_UP_TOKENS, session.capacity - 1), np.int64)
    session.prefill(0, tokens, 0)
    for rows in (1, session.slots):
        session.decode(np.zeros(rows, np.int64), np.ones(rows, np.int64))
