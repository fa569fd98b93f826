"""A thread that runs one step of a model after the other, and how it begins, is looked at, ends and fails.

What a step is, engine_thread and embedding_thread say.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

import trio

from nodes.engine.courier import Courier
from nodes.engine.priority import make_way

logger = logging.getLogger(__name__)

# Steps that break one after the other until the engine gives up: what is left of a device after that is not worth it.
FAULTS_MAX = 3

Result = TypeVar("Result")


class StepThread(ABC, Generic[Result]):
    """Made, started and stopped by the trio thread, once.

    wake: its lock guards what is queued and is held for bookkeeping only; notify it when there may be something to do.
    """

    def __init__(self, name: str, now: Callable[[], float]) -> None:
        """now: the engine's clock, of deadlines too."""
        self.wake = threading.Condition()
        self.ended = trio.Event()
        # The thread writes these, and only it.
        self.step_began: float | None = None  # on the engine's clock, None between steps
        self.faults_total = 0
        self._faults = 0  # since a step went well
        self._name = name
        self._now = now
        self._courier = Courier()
        self._is_stopping = False
        self._thread: threading.Thread | None = None

    def start(self, deliver: Callable[[Result], None], fail: Callable[[], None]) -> None:
        """From a trio task. In trio's thread deliver is called for each result, and fail where the thread ends with a
        fault: FAULTS_MAX steps broke one after the other, or something else did."""
        self._courier.start(trio.lowlevel.current_trio_token())
        self._thread = threading.Thread(target=self._run, args=(deliver, fail), name=self._name, daemon=True)
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

    @abstractmethod
    def _work(self, post: Callable[[Result], None]) -> None:
        """Wait for steps and do them, posting what comes of each, until it is stopping. Raises where it cannot go on.
        On the thread."""

    def _close(self) -> None:
        """Give back what the work held. On the thread, at its end."""

    def _run(self, deliver: Callable[[Result], None], fail: Callable[[], None]) -> None:
        make_way()
        try:
            self._work(lambda result: self._courier.post(partial(deliver, result)))
        except BaseException:  # panics of Rust code are no Exception: those who wait must be told, whatever broke
            logger.exception("the engine has failed", extra={"engine": self._name, "broken_steps": self._faults})
            self._courier.post(fail)
        finally:
            self._close()
            self._courier.post(self.ended.set)
            self._courier.close()
