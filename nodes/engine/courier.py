"""Carries calls from the engine thread to the trio thread, in order, without making the engine thread wait.

Waking trio is a system call, during which Python's interpreter lock is free: the trio thread takes it and works on what
was posted, and whoever posted must wait for the lock before its next step. So a thread of its own does the waking. It
gets the lock when the engine thread is inside ONNX Runtime, where the trio thread's work costs the step nothing.
Measured with int4 weights and one sequence: 0.54 ms between two steps with the engine thread waking trio itself.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress

import trio

Call = Callable[[], object]


class Courier:
    """One thread, from start() to close(). While the trio loop is blocked, one call waits for each step."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()

    def start(self, token: trio.lowlevel.TrioToken) -> None:
        """token: of the trio loop that the calls are for."""
        threading.Thread(target=self._carry, args=(token,), name="engine-courier", daemon=True).start()

    def post(self, call: Call) -> None:
        """Have the trio thread make this call soon. Any thread."""
        self._calls.put(call)

    def close(self) -> None:
        """End the thread once all that was posted before is carried."""
        self._calls.put(None)

    def _carry(self, token: trio.lowlevel.TrioToken) -> None:
        with suppress(trio.RunFinishedError):  # nobody is left to be told
            while (call := self._calls.get()) is not None:
                token.run_sync_soon(call)
