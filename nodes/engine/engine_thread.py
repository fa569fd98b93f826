"""The engine thread: it owns session and KV, and plans, runs, samples and commits one tick after the other.

The scheduler is shared with the trio thread: the lock around it is held for bookkeeping only, never while the model
runs, so submitting and cancelling wait for tens of microseconds at most. Between two runs of the model this thread does
only what the next plan depends on. Text, events and figures are made of a Tick by the trio thread, to which each tick
is posted, while the model runs again.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from functools import partial

import trio

from nodes.engine.courier import Courier
from nodes.engine.errors import EngineFault
from nodes.engine.executor import Execution, Executor, Session
from nodes.engine.priority import make_way
from nodes.engine.scheduler import Outcome, Plan, Scheduler

logger = logging.getLogger(__name__)

# Steps that break one after the other until the engine gives up: what is left of a device after that is not worth it.
FAULTS_MAX = 3


@dataclass(slots=True)
class Tick:
    """What came of one tick. Not changed once posted.

    step_s: its length where a step went well, else None; ended: then, on the engine's clock. decoded, prefilled: tokens
    that the session took in, in decode_s and prefill_s."""

    outcomes: SequenceOf[Outcome]
    step_s: float | None = None
    ended: float = 0.0
    decoded: int = 0
    decode_s: float = 0.0
    prefilled: int = 0
    prefill_s: float = 0.0


class EngineThread:
    """Made, started and stopped by the trio thread, once.

    wake: its lock guards the scheduler and is held for bookkeeping only; notify it when there may be something to do.
    """

    def __init__(self, session: Session, scheduler: Scheduler, now: Callable[[], float]) -> None:
        """now: the clock of deadlines."""
        self.scheduler = scheduler
        self.wake = threading.Condition()
        self.ended = trio.Event()
        # The engine thread writes these, and only it.
        self.step_began: float | None = None  # on the engine's clock, None between steps
        self.faults_total = 0
        self._faults = 0  # since a step went well
        self._session = session
        self._executor = Executor(session)
        self._courier = Courier()
        self._now = now
        self._is_stopping = False
        self._thread: threading.Thread | None = None

    def start(self, deliver: Callable[[Tick], None], fail: Callable[[], None]) -> None:
        """From a trio task. In trio's thread deliver is called for each tick, and fail where the thread ends with a
        fault: FAULTS_MAX steps broke one after the other, or something else did."""
        self._courier.start(trio.lowlevel.current_trio_token())
        self._thread = threading.Thread(target=self._run, args=(deliver, fail), name="engine", daemon=True)
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

    def _run(self, deliver: Callable[[Tick], None], fail: Callable[[], None]) -> None:
        make_way()
        try:
            while (tick := self._tick()) is not None:
                self._courier.post(partial(deliver, tick))
        except BaseException:  # panics of Rust code are no Exception: readers must not wait for ever, whatever broke
            logger.exception("the engine has failed", extra={"broken_steps": self._faults})
            self._courier.post(fail)
        finally:
            self._executor.close()
            self._courier.post(self.ended.set)
            self._courier.close()

    def _tick(self) -> Tick | None:
        """Wait until there is something to do and do one tick of it. None once the thread is to stop."""
        with self.wake:
            plan = self.scheduler.plan(self._now())
            while not (plan.has_steps or plan.expired or self._is_stopping):
                self.wake.wait()
                plan = self.scheduler.plan(self._now())
            if self._is_stopping:
                return None
        if not plan.has_steps:
            return Tick(plan.expired)
        self.step_began = self._now()
        tick = self._execute(plan)
        self.step_began = None
        return tick

    def _execute(self, plan: Plan) -> Tick:
        started = time.perf_counter()
        done = self._executor.execute(plan, self.scheduler.kv)
        if done.fault is not None:
            return Tick([*plan.expired, *self._recover(plan, done, done.fault)])
        self._faults = 0
        with self.wake:
            outcomes = self.scheduler.commit(plan, done.tokens, done.first_token)
        return Tick(
            [*plan.expired, *outcomes] if plan.expired else outcomes,
            time.perf_counter() - started,
            self._now(),
            len(plan.decode),
            done.decode_s,
            len(plan.prefill.token_ids) if plan.prefill is not None else 0,
            done.prefill_s,
        )

    def _recover(self, plan: Plan, done: Execution, fault: Exception) -> list[Outcome]:
        """A step raised: end whose step it was, and let the others go on. Raises the fault again after too many."""
        self._faults += 1
        self.faults_total += 1
        if self._faults >= FAULTS_MAX:
            raise fault
        logger.error("a step of the engine failed; its requests end, the others go on", exc_info=fault)
        self._session.recover()
        error = EngineFault("the engine failed in the middle of the answer")
        with self.wake:
            if done.are_rows_lost:
                return self.scheduler.fail_placed(error)
            outcomes: list[Outcome] = []
            if done.tokens:  # the decode step went well, the chunk after it did not
                outcomes += self.scheduler.commit(replace(plan, prefill=None), done.tokens, None)
            return outcomes + self.scheduler.fail(done.broken, error)
