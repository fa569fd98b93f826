"""A second Session, and a model around it, for tests of what runs sessions: no graph, every mix-up shows."""

from __future__ import annotations

import functools
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import trio
import trio.testing

from nodes.engine.chat_template import ChatTemplate
from nodes.engine.engine import Engine
from nodes.engine.kv_slots import BLOCK_TOKENS
from nodes.engine.logit_rows import BLOCK_LOGITS, LogitBlocks
from nodes.engine.model_loader import LoadedModel
from nodes.engine.sampling import SamplingParams
from nodes.engine.sequence import EngineEvent
from nodes.engine.stream import EngineStream
from nodes.engine.tokenizer import Tokenizer
from nodes.model_tools.random_llama import CHAT_TEMPLATE, IM_END, SPECIAL_TOKENS, small_tokenizer

VOCABULARY = 512
CAPACITY = 256
GARBAGE = -1
# A test that waits this long has failed; none asserts how long anything takes.
HANG_S = 30.0

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


class FakeSession:
    """A toy language model: the logits after a context are a hash of every token in it and of their order.

    Rows hold tokens instead of keys and values. A row read before it was written, or after it was moved away, is an
    assertion error. Special tokens are never the best. While a test holds it, it takes a step for each that is allowed.
    """

    def __init__(
        self,
        slots: int = 4,
        capacity: int = CAPACITY,
        *,
        is_exact: bool = True,
        chunk_blocks_max: int = 1,
        has_blocks: bool = False,
    ) -> None:
        self.slots = slots
        self.capacity = capacity
        self.kv_bytes = slots * capacity * 8
        self.is_exact = is_exact
        self.prefill_tokens_max = chunk_blocks_max * BLOCK_TOKENS
        self.steady_rows_min = 1 if is_exact else 2
        self.vocabulary_size = VOCABULARY
        self.logit_blocks: LogitBlocks | None = None  # of each decode() with has_blocks
        self._has_blocks = has_blocks
        self.recoveries = 0
        self.entered = 0  # decode and prefill calls begun
        self.prefilled = 0  # tokens computed by prefill
        self.batches: list[int] = []  # sizes of the decode steps so far
        self.failures = 0  # so many of the next decode and prefill calls raise
        self.poison = GARBAGE  # a context that holds this token has logits that are no numbers
        self._rows: IntArray = np.full((slots, capacity), GARBAGE, np.int64)
        self._allowed: threading.Semaphore | None = None

    def hold(self) -> None:
        """From now on a decode or prefill call waits until it is allowed."""
        self._allowed = threading.Semaphore(0)

    def allow(self, calls: int = 1) -> None:
        assert self._allowed is not None
        for _ in range(calls):
            self._allowed.release()

    def release(self) -> None:
        allowed, self._allowed = self._allowed, None
        if allowed is not None:
            allowed.release(self.slots)

    def decode(self, token_ids: IntArray, lengths: IntArray) -> FloatArray:
        self._enter()
        self.batches.append(len(token_ids))
        self._rows[np.arange(len(token_ids)), lengths] = token_ids
        logits = np.stack([self._logits(slot, int(length) + 1) for slot, length in enumerate(lengths)])
        if self._has_blocks:
            self.logit_blocks = self._blocks_of(logits)
        return logits

    def _blocks_of(self, logits: FloatArray) -> LogitBlocks:
        maxima = logits.reshape(len(logits), -1, BLOCK_LOGITS).max(axis=2)
        return LogitBlocks(logits, maxima, logits.sum(axis=1))

    def prefill(self, slot: int, token_ids: IntArray, start: int) -> FloatArray:
        self._enter()
        blocks = (start + len(token_ids) - 1) // BLOCK_TOKENS - start // BLOCK_TOKENS + 1
        assert blocks * BLOCK_TOKENS <= self.prefill_tokens_max, "chunk alignment"
        self._rows[slot, start : start + len(token_ids)] = token_ids
        self.prefilled += len(token_ids)
        return self._logits(slot, start + len(token_ids))

    def copy(self, source: int, target: int, length: int) -> None:
        self._rows[target] = GARBAGE
        self._rows[target, :length] = self._rows[source, :length]

    def swap(self, first: int, second: int, first_length: int, second_length: int) -> None:
        held = self._rows[first, :first_length].copy()
        self.copy(second, first, second_length)
        self._rows[second] = GARBAGE
        self._rows[second, :first_length] = held

    def recover(self) -> None:
        self.recoveries += 1

    def _enter(self) -> None:
        self.entered += 1
        if self._allowed is not None:
            self._allowed.acquire()
        if self.failures:
            self.failures -= 1
            raise RuntimeError("the fake session was told to fail")

    def _logits(self, slot: int, length: int) -> FloatArray:
        context = self._rows[slot, :length]
        assert (context != GARBAGE).all(), f"slot {slot} has garbage among its {length} rows"
        if self.poison in context:
            return np.full(VOCABULARY, np.nan, np.float32)
        state = 0
        for token in context.tolist():
            state = (state * 1_000_003 + token + 1) % (1 << 61)
        logits = np.random.default_rng(state).standard_normal(VOCABULARY).astype(np.float32) * 3
        logits[: len(SPECIAL_TOKENS)] = -20
        return logits


@functools.cache
def toy_model() -> LoadedModel:
    """Tokenizer and chat template of random_llama, without weights."""
    return LoadedModel(
        fingerprint="toy",
        eos_ids=frozenset({IM_END}),
        tokenizer=Tokenizer(small_tokenizer(VOCABULARY)),
        chat_template=ChatTemplate(CHAT_TEMPLATE, bos_token=SPECIAL_TOKENS[0], eos_token=SPECIAL_TOKENS[IM_END]),
        weight_bytes=1_000,
    )


class Clock:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def running(engine: Engine) -> AsyncIterator[Engine]:
    """The engine, running; stopped at the end, in the step that a test may still hold its fake session at."""
    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            try:
                yield engine
            finally:
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    await trio.testing.wait_all_tasks_blocked()  # the engine has been told to stop
                if isinstance(engine._session, FakeSession):
                    engine._session.release()


async def read(stream: EngineStream) -> tuple[str, tuple[int, ...], EngineEvent]:
    """Text, ids and last event of a stream read to its end."""
    async with stream:
        event = await stream.receive()
        async for later in stream:
            event = event.merged_with(later)
        return event.text, event.token_ids, event


async def drain(stream: trio.abc.ReceiveChannel[Any]) -> None:
    """Read until the stream raises."""
    while True:
        await stream.receive()


async def until(engine: Engine, **figures: object) -> None:
    """Until the engine's statistics have these figures."""
    while any(getattr(engine.statistics(), name) != value for name, value in figures.items()):
        await trio.sleep(0.001)  # lets the engine thread have the interpreter; no test depends on how long


async def until_delivered(engine: Engine) -> None:
    """Until every stream has been given its last event."""
    while engine._streams:
        await trio.sleep(0.001)


async def until_entered(session: FakeSession, calls: int) -> None:
    """Until so many decode and prefill calls have begun."""
    while session.entered < calls:
        await trio.sleep(0.001)


def greedy(max_tokens: int | None = 40, **options: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **options)  # type: ignore[arg-type]
