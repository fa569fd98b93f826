"""The thread of an embedding engine: it takes steps out of the queue, runs the model, and posts what came of them."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import trio

from nodes.engine.courier import Courier
from nodes.engine.embedding_queue import EmbeddingQueue, IntArray, Step
from nodes.engine.engine_thread import FAULTS_MAX
from nodes.engine.errors import EngineFault
from nodes.engine.pooling import FloatArray
from nodes.engine.priority import make_way

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


class EmbeddingThread:
    """Made, started and stopped by the trio thread, once.

    wake: its lock guards the queue and is held for bookkeeping only; notify it when something was queued.
    """

    def __init__(self, session: EmbeddingSession, queue: EmbeddingQueue, now: Callable[[], float]) -> None:
        """now: the engine's clock."""
        self.queue = queue
        self.wake = threading.Condition()
        self.ended = trio.Event()
        # The thread writes these, and only it.
        self.step_began: float | None = None  # on the engine's clock, None between steps
        self.faults_total = 0
        self._faults = 0  # since a step went well
        self._session = session
        self._courier = Courier()
        self._now = now
        self._is_stopping = False
        self._thread: threading.Thread | None = None

    def start(self, deliver: Callable[[Done], None], fail: Callable[[], None]) -> None:
        """From a trio task. In trio's thread deliver is called for each step, and fail where the thread ends with a
        fault: FAULTS_MAX steps broke one after the other and a single token did after each, or something else broke."""
        self._courier.start(trio.lowlevel.current_trio_token())
        self._thread = threading.Thread(target=self._run, args=(deliver, fail), name="embedding", daemon=True)
        self._thread.start()

    def stack(self) -> str:
        """Where the thread is, in Python's words; empty where it does not run. For the log of what went wrong."""
        frame = sys._current_frames().get(self._thread.ident or 0) if self._thread is not None else None
        return "" if frame is None else "".join(traceback.format_stack(frame))

    def stop(self) -> None:
        """Have the thread end after the step in progress; `ended` says when it has."""
        with self.wake:
            self._is_stopping = True
            self.wake.notify()

    def _run(self, deliver: Callable[[Done], None], fail: Callable[[], None]) -> None:
        make_way()
        try:
            while (step := self._next_step()) is not None:
                self.step_began = self._now()
                for done in self._execute(step):
                    self._courier.post(partial(deliver, done))
                self.step_began = None
                if self._faults >= FAULTS_MAX:
                    logger.error("the embedding engine has failed", extra={"broken_steps": self._faults})
                    self._courier.post(fail)
                    return
        except BaseException:  # those who wait must not do so for ever, whatever broke
            logger.exception("the embedding engine has failed")
            self._courier.post(fail)
        finally:
            self._courier.post(self.ended.set)
            self._courier.close()

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
