"""combined.log and error.log: appended to, and rotated by size. Used by one thread only, which may wait for the disk."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

# A file and its five predecessors: at most 300 MB of combined.log, and as much of error.log.
ROTATE_BYTES = 50_000_000
ROTATED_FILES = 5
COMBINED = "combined.log"
ERROR = "error.log"


class RotatingFile:
    """One log file, `name`, with name.1 (the youngest) to name.5 beside it.

    Whole lines are appended in one write each, so a reader never sees half a line of a living process. A file that was
    moved away, by logrotate or by another process of the same folder, is opened anew.
    """

    def __init__(self, path: Path, rotate_bytes: int = ROTATE_BYTES) -> None:
        """Creates the file. Raises OSError."""
        self._path = path
        self._rotate_bytes = rotate_bytes
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._file = self._open()
        self._size = self._file_size()

    def write(self, line: bytes) -> None:
        """line: with its newline. Kept until flush. Raises OSError when a rotation fails; the line is kept all the same."""
        self._pending.append(line)
        self._pending_bytes += len(line)
        if self._size + self._pending_bytes >= self._rotate_bytes:
            self.flush()

    def flush(self) -> int:
        """Write what is pending. Returns how many lines the disk did not take; those are lost."""
        if not self._pending:
            return 0
        lines, self._pending, self._pending_bytes = self._pending, [], 0
        return self._append(lines)
