"""combined.log and error.log: appended to, rotated by size. Used by one thread only, which may wait for the disk."""

from __future__ import annotations

import os
from contextlib import suppress
from io import FileIO
from pathlib import Path

# A file and its five predecessors: at most 300 MB of combined.log, and as much of error.log.
ROTATE_BYTES = 50_000_000
ROTATED_FILES = 5
# Lines gathered into one write while more are waiting.
FLUSH_BYTES = 256 * 1024
COMBINED = "combined.log"
ERROR = "error.log"


class LogFiles:
    """Both files of one folder. What write and flush return is how many lines the disk did not take; those are lost."""

    def __init__(self, log_dir: Path, rotate_bytes: int = ROTATE_BYTES) -> None:
        """Creates the folder and both files. Raises OSError."""
        self._combined = RotatingFile(log_dir / COMBINED, rotate_bytes)
        self._error = RotatingFile(log_dir / ERROR, rotate_bytes)

    def write(self, line: bytes, *, is_error: bool) -> int:
        """line: without its newline, and with none inside."""
        line += b"\n"
        return self._combined.write(line) + (self._error.write(line) if is_error else 0)

    def flush(self) -> int:
        return self._combined.flush() + self._error.flush()

    def close(self) -> None:
        self._combined.close()
        self._error.close()


class RotatingFile:
    """One log file, `name`, with name.1 (the youngest) to name.5 beside it.

    A file that was moved or removed, by logrotate, a person, or another process with the same folder, is opened anew.
    Nothing is synced to the disk itself: a power cut may cost the last lines, the end of the process does not.
    """

    def __init__(self, path: Path, rotate_bytes: int = ROTATE_BYTES) -> None:
        """Creates the file. Raises OSError."""
        self._path = path
        self._rotate_bytes = rotate_bytes
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._is_torn = False  # the disk took half a line; the next must not continue it
        self._file = self._open()
        self._size = os.fstat(self._file.fileno()).st_size

    def write(self, line: bytes) -> int:
        """Take a line with its newline; it reaches the file by the next flush."""
        lost = 0
        if self._pending_bytes >= FLUSH_BYTES or self._is_full(len(line)):
            lost = self.flush()
            if self._is_full(len(line)):
                # Where renaming fails the file grows on: a long file is better than lost lines.
                with suppress(OSError):
                    self._rotate()
        self._pending.append(line)
        self._pending_bytes += len(line)
        return lost

    def flush(self) -> int:
        lines, self._pending, self._pending_bytes = self._pending, [], 0
        if not lines:
            return 0
        try:
            self._reopen_if_moved()
            self._append(b"".join(lines))
        except OSError:  # a full disk, a folder that is gone: the node goes on, and the loss is counted
            return len(lines)
        return 0

    def close(self) -> None:
        self._file.close()

    def _is_full(self, more_bytes: int) -> bool:
        """A line longer than a whole file is written to an empty one."""
        size = self._size + self._pending_bytes
        return size > 0 and size + more_bytes > self._rotate_bytes

    def _append(self, data: bytes) -> None:
        rest = memoryview(b"\n" + data if self._is_torn else data)
        while rest:
            written = self._file.write(rest)
            self._size += written
            rest = rest[written:]
            self._is_torn = bool(rest)

    def _reopen_if_moved(self) -> None:
        if self._is_in_place():
            self._size = os.fstat(self._file.fileno()).st_size  # others may have appended or truncated
        else:
            self._replace(self._open())

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False

    def _rotate(self) -> None:
        if self._is_in_place():  # else another process has rotated it just now
            for age in range(ROTATED_FILES - 1, 0, -1):
                with suppress(FileNotFoundError):
                    self._aged(age).replace(self._aged(age + 1))
            self._path.replace(self._aged(1))
        self._replace(self._open())

    def _aged(self, age: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{age}")

    def _open(self) -> FileIO:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return self._path.open("ab", buffering=0)

    def _replace(self, file: FileIO) -> None:
        self._file.close()
        self._file = file
        self._is_torn = False
        self._size = os.fstat(file.fileno()).st_size
