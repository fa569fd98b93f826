"""Logging of a process: set up once around everything else, written by a thread, never by the one that logs.

structlog and stdlib loggers meet in one handler, which copies a record into a bounded queue; the writer's thread makes
the line and waits for the disk. With many nodes under one parent (`ai-cluster up`) the nodes write JSON lines to
stderr, and the parent's LogMerger alone writes the files.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import EventDict, WrappedLogger

from observability.log_files import ROTATE_BYTES, LogFiles
from observability.log_lines import encode_line, json_formatter, plain_formatter, scrub, timestamp
from observability.log_writer import WriterThread

# Records that may wait for the disk. At some 1 KB each, 10 MB; a node at full load logs about 1,000 lines a second.
QUEUE_RECORDS_MAX = 10_000
# Lines of child processes that may wait; a line has at most 64 KiB, so 128 MB at worst, and 1 MB in practice.
QUEUE_LINES_MAX = 2_000

Console = Literal["auto", "plain", "json", "none"]

# Only these log below info: at debug, third-party parsers tell headers, and with them keys.
OWN_PACKAGES = ("mesh", "nodes", "observability")
_ERROR_LEVELS = frozenset({"error", "critical"})
LOSS_MESSAGE = "log lines were lost"


@contextmanager
def configure_logging(
    log_dir: Path,
    node_id: str,
    level: str = "info",
    console: Console = "auto",
    *,
    stream: TextIO | None = None,
    rotate_bytes: int = ROTATE_BYTES,
) -> Iterator[WriterThread[logging.LogRecord]]:
    """All logging of this process goes to log_dir until the context ends; then everything queued is on disk.

    level: the least severe of this project's lines, in lower case; others log from info on. console: "plain" also
    writes short lines for people to `stream` (stderr), "json" writes JSON lines there and no files, "auto" is plain on
    a terminal, else none. Yields the writer, whose `lines_dropped` is a metric.
    Raises OSError where the files cannot be opened; nothing is changed then.
    """
    stream = sys.stderr if stream is None else stream
    if console == "auto":
        console = "plain" if stream.isatty() else "none"
    files = None if console == "json" else LogFiles(log_dir, rotate_bytes)
    writer = WriterThread("log-writer", _RecordSink(node_id, console, files, stream), QUEUE_RECORDS_MAX)
    number = logging.getLevelNamesMapping()[level.upper()]
    levels = dict.fromkeys(OWN_PACKAGES, number) | {"": max(number, logging.INFO)}
    root = logging.getLogger()
    before = {name: logging.getLogger(name).level for name in levels}
    handlers = root.handlers[:]
    found = {name: getattr(logging, name) for name in _FOUND_FOR_EACH_RECORD}
    writer.start()
    try:
        for name, nothing in _FOUND_FOR_EACH_RECORD.items():
            setattr(logging, name, nothing)
        root.handlers[:] = [_QueueingHandler(writer)]
        for name, least in levels.items():
            logging.getLogger(name).setLevel(least)
        logging.captureWarnings(True)
        _configure_structlog()
        yield writer
    finally:
        structlog.reset_defaults()
        logging.captureWarnings(False)
        root.handlers[:] = handlers
        for name, value in found.items():
            setattr(logging, name, value)
        for name, least in before.items():
            logging.getLogger(name).setLevel(least)
        writer.stop()


# What logging finds out for each record and no line says: the source line, the thread, the process. A quarter of the
# cost of a call; logging's documentation names these switches for it ("Optimization").
_FOUND_FOR_EACH_RECORD: dict[str, Any] = {
    "_srcfile": None,
    "logThreads": False,
    "logProcesses": False,
    "logMultiprocessing": False,
}


class LogMerger:
    """The files of a parent whose children log JSON lines to their stderr. Used as a context manager.

    Both files exist from __enter__ on, which raises OSError where they cannot be opened.
    """

    def __init__(self, log_dir: Path, *, rotate_bytes: int = ROTATE_BYTES) -> None:
        self._log_dir = log_dir
        self._rotate_bytes = rotate_bytes
        self._writer: WriterThread[tuple[bytes, str]] | None = None

    def __enter__(self) -> LogMerger:
        sink = _LineSink(LogFiles(self._log_dir, self._rotate_bytes))
        self._writer = WriterThread("log-merger", sink, QUEUE_LINES_MAX)
        self._writer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.stop()

    @property
    def lines_dropped(self) -> int:
        return 0 if self._writer is None else self._writer.lines_dropped

    def write_line(self, line: bytes, node_id: str = "unknown") -> None:
        """One line of a child, with or without its newline; never waits. A line of another form becomes a warning,
        under node_id."""
        if self._writer is None:
            raise RuntimeError("LogMerger.write_line is called within `with LogMerger(...)`")
        self._writer.offer((line, node_id))


class _QueueingHandler(logging.Handler):
    """Puts a copy of each record into the writer's queue, with all in it that may change before it is written."""

    def __init__(self, writer: WriterThread[logging.LogRecord]) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        kept = logging.LogRecord.__new__(logging.LogRecord)  # as copy.copy() does it, at a tenth of the time
        kept.__dict__.update(record.__dict__)
        if not hasattr(record, "_logger"):  # what structlog's wrap_for_formatter leaves on its own records
            kept.msg, kept.args = _message(record), None
            for name, value in structlog.contextvars.get_contextvars().items():
                kept.__dict__.setdefault(name, value)
        self._writer.offer(kept, is_urgent=kept.levelno >= logging.ERROR)


class _RecordSink:
    """Makes lines of records. files: None where they go to a collector's pipe alone."""

    def __init__(self, node_id: str, console: Console, files: LogFiles | None, stream: TextIO) -> None:
        self._files = files
        self._stream = stream
        self._json = json_formatter(node_id)
        self._console: logging.Formatter | None = None
        if console == "json":
            self._console = self._json
        elif console == "plain":
            with_colour = stream.isatty() and "NO_COLOR" not in os.environ
            self._console = plain_formatter(node_id, with_colour=with_colour)

    def write(self, record: logging.LogRecord) -> int:
        try:
            return self._write(record)
        except Exception as exc:  # a value that breaks when it is read; the thread must outlive it
            fields = {"log.logger": record.name, "error.type": type(exc).__name__}
            return 1 + self._write(_own_record(logging.ERROR, "a log record could not be written", fields))
        finally:
            # The frames of a traceback hold sockets and buffers, and this record may be the last for hours.
            record.exc_info, record.msg, record.args = None, "", None

    def write_loss(self, count: int) -> None:
        self._write(_own_record(logging.WARNING, LOSS_MESSAGE, {"count": count}))

    def flush(self) -> int:
        return 0 if self._files is None else self._files.flush()

    def close(self) -> None:
        if self._files is not None:
            self._files.close()

    def _write(self, record: logging.LogRecord) -> int:
        lost = 0
        if self._files is not None:
            line = self._json.format(record).encode()
            lost = self._files.write(line, is_error=record.levelno >= logging.ERROR)
        if self._console is not None and not self._print(self._console.format(record)):
            lost += self._files is None  # a closed terminal loses nothing that the files have
        return lost

    def _print(self, line: str) -> bool:
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # the other end of the pipe is gone, or the stream is closed
            return False
        return True


class _LineSink:
    """Takes lines of child processes as they are; what is no log line is made one."""

    def __init__(self, files: LogFiles) -> None:
        self._files = files

    def write(self, item: tuple[bytes, str]) -> int:
        line = item[0].rstrip(b"\r\n")
        level = _level_of(line)
        if level is None:
            return self._wrap(scrub(line.decode(errors="replace")), "stderr", {"node_id": item[1]})
        return self._files.write(line, is_error=level in _ERROR_LEVELS)

    def write_loss(self, count: int) -> None:
        self._wrap(LOSS_MESSAGE, __name__, {"node_id": "up", "count": count})

    def flush(self) -> int:
        return self._files.flush()

    def close(self) -> None:
        self._files.close()

    def _wrap(self, message: str, name: str, fields: dict[str, object]) -> int:
        core = {"@timestamp": timestamp(time.time()), "level": "warning", "message": message, "logger": name}
        return self._files.write(encode_line(core | fields).encode(), is_error=False)


def _level_of(line: bytes) -> str | None:
    """The level of a JSON log line; None where it is something else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    level = record.get("level") if isinstance(record, dict) else None
    return level if isinstance(level, str) else None


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # arguments that do not fit, an object that cannot be told; who logs must not fail for it
        return record.msg if isinstance(record.msg, str) else f"<{type(record.msg).__name__}>"


def _own_record(level: int, message: str, fields: Mapping[str, object]) -> logging.LogRecord:
    core = {"name": __name__, "levelno": level, "levelname": logging.getLevelName(level), "msg": message}
    return logging.makeLogRecord({**core, **fields})


def _configure_structlog() -> None:
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.PositionalArgumentsFormatter(),
            _resolve_error,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def _resolve_error(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """`exc_info=True` means the error being handled here; in the writer's thread there is none."""
    exc_info = event.get("exc_info")
    if isinstance(exc_info, BaseException):
        event["exc_info"] = (type(exc_info), exc_info, exc_info.__traceback__)
    elif exc_info and not isinstance(exc_info, tuple):
        event["exc_info"] = sys.exc_info()
    return event
