"""Threads that compute make way for those that answer: where the cores are all in use, a request is refused, forwarded
or streamed at once, and the model is slower by that little.

Linux keeps the priority of each thread, and a thread starts with that of the one that started it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

# More than the other threads have: beside one of them on the same core it gets a quarter of it, alone all of it.
NICENESS = 5
NICENESS_MAX = 19  # of Linux


def make_way() -> None:
    """The calling thread does from now on, and all that it starts. Nothing happens on other systems."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, min(NICENESS_MAX, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS))


def call_making_way(function: Callable[[], Result]) -> Result:
    """Call it in a thread of its own that makes way, for what starts threads itself. Blocks; raises what it raises."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        make_way()
        try:
            results.append(function())
        except BaseException as exc:  # whatever it is, it is the caller's
            errors.append(exc)

    thread = threading.Thread(target=run, name="engine-loader", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
