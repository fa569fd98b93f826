"""One process at a time, by a lock file that the system frees when its holder ends, however that ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nodes.model_tools.errors import ModelToolError

try:
    import fcntl
except ImportError:  # no flock outside POSIX; there two processes in one folder go unnoticed
    fcntl = None  # type: ignore[assignment]


@contextmanager
def held(file: Path, complaint: str) -> Iterator[None]:
    """Hold the lock of `file`, which is made. Raises ModelToolError(complaint) when another process has it, OSError."""
    with file.open("w") as lock:
        try:
            if fcntl is not None:
                fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise ModelToolError(complaint) from exc
        yield
