"""Whether an engine can be asked: it runs, and no step of its thread has failed it or does not return."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import trio

from nodes.engine.engine_statistics import FAILED, LOADING, READY, STUCK, State
from nodes.engine.errors import EngineFault, EngineStopped
from nodes.engine.step_thread import StepThread

logger = logging.getLogger(__name__)

# How long run() waits for the step in progress when it is cancelled; a step on a loaded CPU takes up to seconds.
STOP_TIMEOUT_S = 10.0
# A step is stuck when it takes this many times the median, and at least the first bound; before there is a median,
# the second one, since a device may compile its kernels in the first step.
STUCK_STEPS = 20
STUCK_MIN_S = 10.0  # steps that share their cores with other work take seconds now and then
STUCK_FIRST_S = 60.0
WATCH_INTERVAL_S = 0.5
# A watch that comes so much too late says that the whole process stood still, as a suspended machine does, and that a
# step began before that cannot be judged by the clock.
PAUSE_S = 1.0


class StepWatch:
    """The state of one engine. The trio thread's.

    median_step_s: 0 before the first step. now: the engine's clock. on_stuck: ends everything that is asked of the
    engine, while its thread may go on."""

    def __init__(
        self,
        thread: StepThread[Any],
        *,
        median_step_s: Callable[[], float],
        now: Callable[[], float],
        on_stuck: Callable[[EngineFault], None],
    ) -> None:
        self.state: State = LOADING
        self._is_running = False
        self._thread = thread
        self._median_step_s = median_step_s
        self._now = now
        self._on_stuck = on_stuck

    def check(self) -> None:
        """Raises EngineFault when the engine has failed or is stuck, EngineStopped while run() does not run."""
        if self.state is FAILED:
            raise EngineFault("the engine has failed; the log says why")
        if self.state is STUCK:
            raise EngineFault("a step of the engine does not return")
        if not self._is_running:
            raise EngineStopped("the engine is not running")

    def fail(self) -> None:
        """The thread has ended with a fault. The caller ends what was asked of it."""
        self.state = FAILED

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Watch the thread, which was started, until cancelled; then stop it."""
        self.state, self._is_running = READY, True
        task_status.started()
        try:
            watched_from = self._now()
            while True:
                due = trio.current_time() + WATCH_INTERVAL_S
                await trio.sleep_until(due)
                if trio.current_time() - due > PAUSE_S:
                    watched_from = self._now()
                self.look(watched_from)
        finally:
            self._is_running = False
            self._thread.stop()
            with trio.move_on_after(STOP_TIMEOUT_S, shield=True) as scope:
                await self._thread.ended.wait()
            if scope.cancelled_caught:
                logger.error("a step of the engine did not end; its thread is left behind")

    def look(self, watched_from: float) -> None:
        """Say when a step does not return, and when it has after all. Time before watched_from does not count."""
        began, median_s = self._thread.step_began, self._median_step_s()
        limit_s = max(STUCK_MIN_S, STUCK_STEPS * median_s) if median_s else STUCK_FIRST_S
        is_stuck = began is not None and self._now() - max(began, watched_from) > limit_s
        if is_stuck and self.state is READY:
            self.state = STUCK
            logger.error(
                "a step of the engine does not return; its requests end, and it takes none until it does",
                extra={"stack": self._thread.stack()},
            )
            self._on_stuck(EngineFault("a step of the engine does not return"))  # another engine can go on
        elif not is_stuck and self.state is STUCK:
            self.state = READY
            logger.warning("the step of the engine has returned; the engine is ready again")
