"""How fast this machine reads memory: a worker that streams over an array too large for any cache."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # one worker a core, so that the cores do not wait for each other

import numpy as np

from tests.benchmark.engine.worker import serve

ARRAY_BYTES = 256 << 20
READ_S = 0.4


def main() -> None:
    array = np.ones(ARRAY_BYTES // 4, np.float32)
    integers = array.view(np.int64)
    # Which of them streams fastest depends on numpy's build.
    kernels: list[Callable[[], Any]] = [lambda: array.dot(array), array.sum, array.max, integers.max]

    def seconds(kernel: Callable[[], Any]) -> float:
        started = time.perf_counter()
        kernel()
        return time.perf_counter() - started

    def read() -> dict[str, Any]:
        best = min(kernels, key=seconds)
        started, times = time.perf_counter(), 0
        while time.perf_counter() - started < READ_S:
            best()
            times += 1
        return {"bytes_per_s": times * ARRAY_BYTES / (time.perf_counter() - started)}

    serve({"read": read})


if __name__ == "__main__":
    main()
