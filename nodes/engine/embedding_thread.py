"""The thread of an embedding engine: it takes steps out of the queue, runs the model, and posts what came of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nodes.engine.embedding_queue import EmbeddingQueue, IntArray, Step
from nodes.engine.errors import EngineFault
from nodes.engine.pooling import FloatArray
from nodes.engine.step_thread import FAULTS_MAX, StepThread

logger = logging.getLogger(__name__)

TRIAL: IntArray = np.zeros(1, np.int64)  # an input that every model takes


class EmbeddingSession(Protocol):
    """As nodes.engine.embedding_session has it; used by the engine thread alone."""

    @property
    def dimensions(self) -> int: ...
    @property
    def rows_max(self) -> int: ...
    @property
    def step_tokens(self) -> int: ...
    def embed(self, inputs: Sequence[IntArray]) -> FloatArray: ...


@dataclass(frozen=True, slots=True)
class Done:
    """What came of one step. vectors: float32 [rows, dimensions], or why there are none. seconds: its length; ended: on
    the engine's clock."""

    step: Step
    vectors: FloatArray | EngineFault
    seconds: float
    ended: float


class EmbeddingThread(StepThread[Done]):
    """Of one session; notify `wake` when something was put into the queue."""

    def __init__(self, session: EmbeddingSession, queue: EmbeddingQueue, now: Callable[[], float]) -> None:
        """now: the engine's clock."""
        super().__init__("embedding engine", now)
        self.queue = queue
        self._session = session

    def _work(self, post: Callable[[Done], None]) -> None:
        """Gives up where FAULTS_MAX steps broke one after the other, and a single token did after each."""
        while (step := self._next_step()) is not None:
            self.step_began = self._now()
            for done in self._execute(step):
                post(done)
            self.step_began = None
            if self._faults >= FAULTS_MAX:
                raise EngineFault("steps broke one after the other")

    def _next_step(self) -> Step | None:
        """Wait until there is one. None once the thread is to stop."""
        with self.wake:
            while not self._is_stopping:
                step = self.queue.next_step()
                if step is not None:
                    return step
                self.wake.wait()
        return None

    def _execute(self, step: Step) -> Iterator[Done]:
        """Where a step of several requests breaks each is computed by itself, so that one cannot fail the others."""
        done = self._run_step(step)
        parts = step.by_request()
        is_shared_fault = isinstance(done.vectors, EngineFault) and len(parts) > 1
        for part in map(self._run_step, parts) if is_shared_fault else (done,):
            if isinstance(part.vectors, EngineFault):
                self.faults_total += 1
                # An input that breaks the model, sent again and again, must not end an engine that serves all others.
                self._faults = 0 if self._passes_trial() else self._faults + 1
            else:
                self._faults = 0
            yield part

    def _passes_trial(self) -> bool:
        """Whether the model still embeds one token."""
        try:
            return bool(np.isfinite(self._session.embed([TRIAL])).all())
        except Exception as exc:
            logger.error("the embedding engine fails at a single token as well", exc_info=exc)
            return False

    def _run_step(self, step: Step) -> Done:
        started = time.perf_counter()
        vectors: FloatArray | EngineFault
        try:
            vectors = self._session.embed(step.inputs())
        except Exception as exc:
            extra = {"inputs": len(step.rows), "requests": len(step.requests)}
            logger.error("a step of the embedding engine failed", exc_info=exc, extra=extra)
            vectors = EngineFault("the engine failed while it computed these embeddings")
        return Done(step, vectors, time.perf_counter() - started, self._now())
