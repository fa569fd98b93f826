"""The engine thread: it owns session and KV, and plans, runs, samples and commits one tick after the other.

The scheduler is shared with the trio thread: the lock around it is held for bookkeeping only, never while the model
runs, so submitting and cancelling wait for tens of microseconds at most. Between two runs of the model this thread does
only what the next plan depends on. Text, events and figures are made of a Tick by the trio thread, to which each tick
is posted, while the model runs again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

from nodes.engine.errors import EngineFault
from nodes.engine.executor import Execution, Executor, Session
from nodes.engine.scheduler import Outcome, Plan, Scheduler
from nodes.engine.step_thread import FAULTS_MAX, StepThread

logger = logging.getLogger(__name__)


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


class EngineThread(StepThread[Tick]):
    """Of one session; `wake` guards the scheduler."""

    def __init__(self, session: Session, scheduler: Scheduler, now: Callable[[], float]) -> None:
        """now: the clock of deadlines."""
        super().__init__("engine", now)
        self.scheduler = scheduler
        self._session = session
        self._executor = Executor(session)

    def _work(self, post: Callable[[Tick], None]) -> None:
        while (tick := self._tick()) is not None:
            post(tick)

    def _close(self) -> None:
        self._executor.close()

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
            outcomes = self.scheduler.commit(plan, done.tokens, done.first_token, done.prefill_s)
        return Tick(
            [*plan.expired, *outcomes] if plan.expired else outcomes,
            time.perf_counter() - started,
            self._now(),
            len(plan.decode),
            done.decode_s,
            sum(len(chunk.token_ids) for chunk in plan.prefill),
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
            if done.tokens:  # the decode step went well, a chunk after it did not
                outcomes += self.scheduler.commit(replace(plan, prefill=()), done.tokens, None)
            return outcomes + self.scheduler.fail(done.broken, error)
