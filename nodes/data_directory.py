"""A node's own folder: held by one process at a time, and keeper of the counter that tells its lives apart."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from mesh.wire import GENERATION_MAX
from nodes.config import ADMIN_TOKEN_CHARS_MIN, ConfigInvalid

try:
    import fcntl
except ImportError:  # no flock outside POSIX; there two nodes in one folder go unnoticed
    fcntl = None  # type: ignore[assignment]


GENERATION_FILE = "generation"
ADMIN_TOKEN_FILE = "admin-token"  # noqa: S105 (a file name)
ADMIN_TOKEN_BYTES = 32  # random: nobody guesses 256 bits
SECRET_MODE = 0o600
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class DataDirectory:
    """`with DataDirectory(path) as data`: creates and locks the folder. Raises ConfigInvalid when it cannot."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / "lock", "a+")
        except OSError as exc:
            raise self._unusable(exc) from exc
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            lock.seek(0)
            holder = lock.read(20).strip() or "unknown"
            lock.close()
            raise ConfigInvalid(
                f"data_dir {self.path} is in use by process {holder}; give this node its own with --data-dir"
            ) from exc
        try:
            # Past the file's buffer, which would try the write again when it is closed.
            os.ftruncate(lock.fileno(), 0)
            os.write(lock.fileno(), f"{os.getpid()}\n".encode())
        except OSError as exc:
            lock.close()
            raise self._unusable(exc) from exc
        self._lock = lock
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()  # and with it the lock

    def check(self) -> None:
        """Raises ConfigInvalid where entering would, and makes nothing. Whether a process has it is not looked at."""
        try:
            check_writable(self.path)
        except OSError as exc:
            raise self._unusable(exc) from exc

    def write_start_file(self, file_name: str, text: str, *, mode: int = 0o644) -> None:
        """As write_durably() a file of this folder, where a start cannot do without. Raises ConfigInvalid."""
        try:
            write_durably(self.path / file_name, text, mode=mode)
        except OSError as exc:
            raise self._unusable(exc) from exc

    def _unusable(self, fault: OSError) -> ConfigInvalid:
        return ConfigInvalid(f"data_dir {self.path}: {fault.strerror}; {folder_fix(fault, '--data-dir')}")

    def next_generation(self) -> int:
        """One more than at any earlier start from this folder. On disk before it returns, so no two lives share one.

        Raises ConfigInvalid."""
        generation = self.last_generation() + 1
        self.write_start_file(GENERATION_FILE, f"{generation}\n")
        return generation

    def last_generation(self) -> int:
        """Of the latest start from this folder; 0 before the first. Raises ConfigInvalid."""
        file = self.path / GENERATION_FILE
        try:
            last = int(file.read_text())
            if not 0 <= last < GENERATION_MAX:
                raise ValueError
        except FileNotFoundError:
            return 0
        except OSError as exc:
            raise ConfigInvalid(f"{file} cannot be read: {exc.strerror}; give this node's user its --data-dir") from exc
        except ValueError as exc:
            raise ConfigInvalid(
                f"{file} holds no generation number; delete it, peers will tell this node its generation"
            ) from exc
        return last

    def keep_generation(self, generation: int) -> None:
        """Remember a generation: the next start's is higher. On disk before it returns. Raises OSError."""
        write_durably(self.path / GENERATION_FILE, f"{generation}\n")

    def admin_token(self) -> str:
        """What opens this node's /admin: made at the first start, readable by this user alone. Raises ConfigInvalid."""
        token = self.kept_admin_token()
        if token is None:
            token = secrets.token_urlsafe(ADMIN_TOKEN_BYTES)
            self.write_start_file(ADMIN_TOKEN_FILE, f"{token}\n", mode=SECRET_MODE)
        return token

    def kept_admin_token(self) -> str | None:
        """That of an earlier start; None before the first. Raises ConfigInvalid."""
        file = self.path / ADMIN_TOKEN_FILE
        try:
            token = file.read_text().strip()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigInvalid(f"{file} cannot be read: {exc}; delete it, and the next start makes a new one") from exc
        if len(token) < ADMIN_TOKEN_CHARS_MIN:
            raise ConfigInvalid(
                f"{file} holds {len(token)} characters, a token has at least {ADMIN_TOKEN_CHARS_MIN}; "
                "delete it, and the next start makes a new one"
            )
        return token


def folder_fix(fault: OSError, flag: str) -> str:
    """What to do about a folder that takes no files."""
    if fault.errno in DISK_FULL:
        return f"free space on its disk, or give a folder on another with {flag}"
    return f"give a writable folder with {flag}"


def check_writable(folder: Path) -> None:
    """Raises OSError where the folder could not be made, or takes no files; makes nothing."""
    if folder.is_dir():
        nearest = folder
    elif folder.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    else:
        nearest = next(parent for parent in folder.absolute().parents if parent.exists())
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def write_durably(file: Path, text: str, *, mode: int = 0o644) -> None:
    """Replace the file's content whole; on disk before it returns. mode: who may read it, from its first byte on.

    Raises OSError; the file is as before then."""
    temporary = file.with_suffix(".new")
    temporary.unlink(missing_ok=True)  # of a process that was killed; its mode may be another
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
