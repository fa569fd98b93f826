"""A thread that takes items from a bounded queue and hands them to a sink, so that nobody else waits for a disk."""

from __future__ import annotations

import queue
import threading
import time
from typing import Generic, Protocol, TypeVar

# At the end: how long the sink may take for what is queued. Then the process ends without those lines.
STOP_TIMEOUT_S = 5.0
# After each flush, for what comes next to gather: items written together cost much less than each alone, woken up for
# with cold caches. What is urgent, and a queue that is half full, ends it.
GATHER_S = 0.05

Item = TypeVar("Item", contravariant=True)


class Sink(Protocol[Item]):
    """Where items end up. Called from one thread only. The numbers returned: lines lost since the last call."""

    def write(self, item: Item) -> int: ...
    def write_loss(self, count: int) -> None:
        """Leave a line that says that `count` lines are missing before it."""
        ...

    def flush(self) -> int: ...
    def close(self) -> None: ...


class WriterThread(Generic[Item]):
    """offer() never waits: an item that finds the queue full is dropped and counted. Between start and stop it runs."""

    def __init__(self, name: str, sink: Sink[Item], queue_items_max: int) -> None:
        self._sink = sink
        self._queue: queue.Queue[Item | None] = queue.Queue(queue_items_max)
        # A daemon, because a sink stuck on a dead disk must not keep the process.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._lock = threading.Lock()
        self._lines_dropped = 0
        self._is_stopped = False
        self._queue_half = max(1, queue_items_max // 2)
        self._hurry = threading.Event()

    @property
    def lines_dropped(self) -> int:
        """Lines lost since the start: to a full queue, a disk that did not take them, or after the end."""
        return self._lines_dropped

    def start(self) -> None:
        self._thread.start()

    def offer(self, item: Item, *, is_urgent: bool = False) -> None:
        """From any thread. is_urgent: it may be the last one before the process dies."""
        if self._is_stopped:
            self._count_dropped(1)
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._count_dropped(1)
        if is_urgent or self._queue.qsize() >= self._queue_half:
            self._hurry.set()

    def stop(self) -> None:
        """Write out what is queued, within STOP_TIMEOUT_S, and end the thread."""
        self._is_stopped = True
        self._hurry.set()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        try:
            self._queue.put(None, timeout=STOP_TIMEOUT_S)
        except queue.Full:
            return
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        reported = 0
        while (item := self._queue.get()) is not None:
            self._count_dropped(self._sink.write(item))
            del item  # an idle thread must not keep the last error's frames alive
            if self._queue.empty():
                reported = self._flush(reported)
                self._hurry.wait(GATHER_S)
                self._hurry.clear()
        self._flush(reported)
        self._sink.close()

    def _flush(self, reported: int) -> int:
        """Returns how many dropped lines have been told of."""
        self._count_dropped(self._sink.flush())
        dropped = self._lines_dropped
        if dropped > reported:
            self._sink.write_loss(dropped - reported)
            self._count_dropped(self._sink.flush())
        return dropped

    def _count_dropped(self, count: int) -> None:
        if count:
            with self._lock:
                self._lines_dropped += count
