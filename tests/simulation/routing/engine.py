"""A model of one node's engine: continuous batching in slots, prefill by chunks between decode steps, a prefix cache of
one conversation a slot, the least recently used given up first. Time advances by phases of equal ticks."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from mesh.view import ModelLoad
from nodes.engine.estimate import estimate_first_token
from tests.simulation.routing.traces import BLOCK_TOKENS, Conversation, Request, shared_tokens

ANSWER_TOKENS_FIRST = 256.0  # as nodes.engine.engine begins
CONTEXT_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Speed:
    """prefill: tokens/s. A decode step of n rows takes step_s + n x row_s.

    The default is the fp32 model of 200M parameters of docs/performance.md on two cores: 8 rows make 199 tokens/s."""

    prefill_rate: float = 435.0
    step_s: float = 0.025
    row_s: float = 0.0019

    def step(self, rows: int) -> float:
        return self.step_s + rows * self.row_s if rows else 0.0

    def times(self, factor: float) -> Speed:
        return Speed(self.prefill_rate * factor, self.step_s / factor, self.row_s / factor)


@dataclass(slots=True, eq=False)
class Run:
    """One request on the engine. left: tokens to prefill, then those to generate."""

    request: Request
    prefill_left: int
    answer_left: int
    cached: int = 0


@dataclass(slots=True)
class Held:
    """Rows that an idle slot keeps: so many tokens of a conversation."""

    conversation: Conversation
    tokens: int
    prompt_tokens: int
    last_used: int


@dataclass(slots=True)
class Engine:
    """began(request, now): its first token came; ended(request, now): its last."""

    speed: Speed
    slots: int
    queue_limit: int
    schedule: Callable[[float, Callable[[], None]], None]
    began: Callable[[Request, float], None]
    ended: Callable[[Request, float], None]
    prefilled_tokens: int = 0
    decoding: list[Run] = field(default_factory=list)
    prefilling: Run | None = None
    waiting: deque[Run] = field(default_factory=deque)
    held: list[Held] = field(default_factory=list)
    answer_tokens: float = ANSWER_TOKENS_FIRST
    _phase: int = 0  # a number that tells the latest plan from those it replaced
    _start: float = 0.0
    _tick_s: float = 0.0
    _ticks: int = 0
    _uses: int = 0
    _decode_rate: float = 0.0

    @property
    def outstanding(self) -> int:
        return len(self.decoding) + (self.prefilling is not None) + len(self.waiting)

    def runs(self) -> list[Run]:
        """All that are here."""
        return [*self.decoding, *([self.prefilling] if self.prefilling else []), *self.waiting]

    def submit(self, request: Request, now: float) -> bool:
        """False when its queue is full."""
        if self.outstanding - self.slots >= self.queue_limit:
            return False
        self.waiting.append(Run(request, request.prompt_tokens, request.answer_tokens))
        if not self._ticks:
            self._plan(now)
        elif self.prefilling is None and len(self.decoding) < self.slots:
            self._cut(now)
        return True

    def load(self, now: float) -> ModelLoad:
        """What the real engine would report."""
        done = self._done(now)
        busy = [*self.decoding, *([self.prefilling] if self.prefilling else [])]
        remaining = []
        for run in busy:
            generated = run.request.answer_tokens - run.answer_left + (done if run.prefill_left == 0 else 0)
            remaining.append(max(self.answer_tokens - generated, self.answer_tokens / 4))
        placeable = min(len(self.waiting), self.slots - len(busy))
        queued_tokens = sum(run.prefill_left for run in self.waiting)
        if self.prefilling is not None:
            queued_tokens += max(0, self.prefilling.prefill_left - done * BLOCK_TOKENS)
        estimate = estimate_first_token(
            prefill_rate=self.speed.prefill_rate,
            step_s=self.speed.step(len(busy)),
            answer_tokens=self.answer_tokens,
            slots=self.slots,
            queued=len(self.waiting),
            queued_tokens=queued_tokens,
            remaining_tokens=remaining,
        )
        return ModelLoad(
            active=len(busy) + placeable,
            queued=len(self.waiting) - placeable,
            free_slots=self.slots - len(busy) - placeable,
            prefill_rate=self.speed.prefill_rate,
            decode_rate=self._decode_rate,
            queued_tokens=queued_tokens,
            step_s=self._tick_s,
            wait_s=estimate.wait_s,
            prompt_token_s=estimate.prompt_token_s,
            answer_tokens=self.answer_tokens,
        )

    def conversations(self) -> list[tuple[int, ...]]:
        """Names of the blocks of each conversation whose rows are in a slot, the latest used first."""
        busy = [*self.decoding, *([self.prefilling] if self.prefilling else [])]
        names = [run.request.conversation.names(run.request.prompt_tokens - run.prefill_left) for run in busy]
        latest = sorted(self.held, key=lambda held: -held.last_used)
        return [*names, *(held.conversation.names(min(held.tokens, held.prompt_tokens)) for held in latest)]

    def _done(self, now: float) -> int:
        return min(self._ticks, int((now - self._start) / self._tick_s + 1e-9)) if self._ticks else 0

    def _cut(self, now: float) -> None:
        """Someone came who finds a slot free: the phase ends with the tick in progress."""
        ticks = max(1, math.ceil((now - self._start) / self._tick_s - 1e-9))
        if ticks < self._ticks:
            self._begin(self._start, self._tick_s, ticks)

    def _begin(self, start: float, tick_s: float, ticks: int) -> None:
        self._phase += 1
        self._start, self._tick_s, self._ticks = start, tick_s, ticks
        phase = self._phase
        self.schedule(start + tick_s * ticks, lambda: self._end(phase))

    def _plan(self, now: float) -> None:
        if self.prefilling is None and self.waiting and len(self.decoding) < self.slots:
            self._place(self.waiting.popleft())
        step_s = self.speed.step(len(self.decoding))
        if self.decoding:
            self._decode_rate = len(self.decoding) / step_s
        ticks = min((run.answer_left for run in self.decoding), default=1 << 30)
        if self.prefilling is not None:
            left = self.prefilling.prefill_left
            chunk = min(left, BLOCK_TOKENS)
            step_s += chunk / self.speed.prefill_rate
            ticks = min(ticks, max(1, left // BLOCK_TOKENS))
        elif not self.decoding:
            self._ticks = 0
            return
        self._begin(now, step_s, ticks)

    def _end(self, phase: int) -> None:
        if phase != self._phase:
            return
        now = self._start + self._tick_s * self._ticks
        for run in self.decoding:
            run.answer_left -= self._ticks
        over = [run for run in self.decoding if run.answer_left <= 0]
        self.decoding = [run for run in self.decoding if run.answer_left > 0]
        run = self.prefilling
        if run is not None:
            tokens = min(run.prefill_left, self._ticks * BLOCK_TOKENS)
            run.prefill_left -= tokens
            self.prefilled_tokens += tokens
            if not run.prefill_left:
                self.prefilling = None
                run.answer_left -= 1
                self.began(run.request, now)
                (self.decoding if run.answer_left else over).append(run)
        for run in over:
            self._retire(run, now)
        self._plan(now)

    def _place(self, run: Run) -> None:
        request = run.request
        limit = request.prompt_tokens - 1
        best, source = 0, None
        for other in self.decoding:
            tokens = other.request.prompt_tokens + other.request.answer_tokens - other.answer_left
            best = max(best, shared_tokens(request.conversation, other.request.conversation, limit, tokens))
        for held in self.held:
            tokens = shared_tokens(request.conversation, held.conversation, limit, held.tokens)
            if tokens > best:
                best, source = tokens, held
        run.cached = best if best >= BLOCK_TOKENS else 0
        run.prefill_left = request.prompt_tokens - run.cached
        self._uses += 1
        if source is not None and run.cached:
            source.last_used = self._uses
            if source.tokens - run.cached < BLOCK_TOKENS:
                self.held.remove(source)
        self.prefilling = run
        if len(self.held) > self.slots - len(self.decoding) - 1:
            self.held.remove(min(self.held, key=lambda held: held.last_used))

    def _retire(self, run: Run, now: float) -> None:
        request = run.request
        self.answer_tokens += (request.answer_tokens - self.answer_tokens) / 16
        self._uses += 1
        tokens = request.prompt_tokens + request.answer_tokens
        self.held.append(Held(request.conversation, tokens, request.prompt_tokens, self._uses))
        self.ended(request, now)
