"""From a log record to one line: plain fields, bounded, and without what a log must never hold.

Callers never log keys or prompts; what is here is the second fence, for texts that come from elsewhere, such as the
message of an exception.
"""

from __future__ import annotations

import json
import logging
import numbers
import re
import traceback
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from enum import Enum, StrEnum
from functools import lru_cache
from itertools import islice
from pathlib import PurePath
from types import TracebackType
from typing import Any

import structlog
from structlog.typing import EventDict, WrappedLogger

from mesh.view import Address

# `ai-cluster up` and log shippers cut or drop lines beyond 64 KiB.
LINE_BYTES_MAX = 60 * 1024
# A character takes up to 12 bytes in ASCII JSON, so that one full field still fits into a line.
FIELD_CHARS_MAX = 4_000
STACK_TRACE_CHARS_MAX = 16_000
SHORT_CHARS_MAX = 1_000  # of message and error in a line that was too long as a whole
FIELDS_MAX = 64
ITEMS_MAX = 64
DEPTH_MAX = 4

CORE_FIELDS = ("@timestamp", "level", "message", "logger", "node_id")
REDACTED = "[redacted]"
# The last word of a field's name whose value is a secret or somebody's text.
_SECRET_WORDS = frozenset(
    {
        *("admin_token", "api_key", "authorization", "cluster_key", "cookie", "key", "password", "secret", "token"),
        *("body", "completion", "content", "messages", "prompt", "text"),
    }
)
# An API key: `sk-<public id>-<secret>`, of which the public id may stay, or a long word of another maker.
_API_KEY = re.compile(r"\bsk-(?:([A-Za-z0-9]{1,16})-[A-Za-z0-9_-]+|[A-Za-z0-9_-]{17,})")
_BEARER = re.compile(r"\b(bearer|basic)\s+[^\s'\",]+", re.IGNORECASE)
# pydantic quotes the value it refuses, which may be a prompt.
_REFUSED_INPUT = re.compile(r"\binput_value=.*?(?=, input_type=|\Z)", re.DOTALL)
_SPACE = re.compile(r"\s")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")

# What every record has; the rest is what the caller gave. A newer Python has taskName too.
_RECORD_FIELDS = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
_ENCODER = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"))
_LEVEL_COLOURS = {"debug": "2", "info": "32", "warning": "33", "error": "31", "critical": "1;31"}


def json_formatter(node_id: str) -> logging.Formatter:
    """Formats records of stdlib loggers and of structlog as one JSON object in ASCII, without a newline."""
    return _formatter(node_id, encode_line)


def plain_formatter(node_id: str, *, with_colour: bool) -> logging.Formatter:
    """Formats records as short lines for people; a stack trace follows on lines of its own."""
    return _formatter(node_id, lambda fields: _plain_line(fields, with_colour=with_colour))


def encode_line(fields: Mapping[str, Any]) -> str:
    """One JSON object of at most LINE_BYTES_MAX bytes; where it would be longer, of the core fields and the error."""
    line = _dumps(fields)
    if len(line) <= LINE_BYTES_MAX:
        return line
    kept = {name: str(fields[name])[:SHORT_CHARS_MAX] for name in CORE_FIELDS if name in fields}
    kept |= {k: str(fields[k])[:SHORT_CHARS_MAX] for k in ("request_id", "error.type", "error.message") if k in fields}
    return _dumps(kept | {"truncated": True})


def timestamp(unix_s: float) -> str:
    """ISO 8601, UTC, milliseconds."""
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def scrub(text: str, chars_max: int = FIELD_CHARS_MAX) -> str:
    """text without keys and quoted input, and not longer than about chars_max."""
    cut = text[:chars_max]
    # Almost no text has any of these, and looking for what each begins with costs a tenth of looking for all of it.
    if "sk-" in cut:
        cut = _API_KEY.sub(lambda match: f"sk-{match[1]}-{REDACTED}" if match[1] else f"sk-{REDACTED}", cut)
    if _SPACE.search(cut):
        cut = _BEARER.sub(rf"\1 {REDACTED}", cut)
    if "input_value=" in cut:
        cut = _REFUSED_INPUT.sub(f"input_value={REDACTED}", cut)
    return cut if len(text) <= chars_max else f"{cut} [cut: {len(text)} characters]"


def _dumps(fields: Mapping[str, Any]) -> str:
    # ASCII: no reader splits a line at U+2028, and no terminal obeys what a line holds.
    return _ENCODER.encode(fields)


def _formatter(node_id: str, render: Callable[[Mapping[str, Any]], str]) -> logging.Formatter:
    def to_line(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
        return render(_fields(node_id, event))

    return _LineFormatter(node_id, render, structlog.stdlib.ProcessorFormatter(processors=[to_line]))


class _LineFormatter(logging.Formatter):
    """structlog's records go through its own formatter; stdlib's, which are nearly all, at once."""

    def __init__(
        self, node_id: str, render: Callable[[Mapping[str, Any]], str], of_structlog: logging.Formatter
    ) -> None:
        super().__init__()
        self._node_id = node_id
        self._render = render
        self._of_structlog = of_structlog

    def format(self, record: logging.LogRecord) -> str:
        given = record.__dict__
        if "_logger" in given:
            return self._of_structlog.format(record)
        # Arguments are in the message already: they may have changed since the line was logged.
        event: EventDict = {"event": record.msg, "_record": record}
        if record.exc_info:
            event["exc_info"] = record.exc_info
        if record.stack_info:
            event["stack_info"] = record.stack_info
        event.update({name: value for name, value in given.items() if name not in _RECORD_FIELDS})
        return self._render(_fields(self._node_id, event))


def _fields(node_id: str, event: EventDict) -> dict[str, Any]:
    """Core fields first, then what the caller gave, then the error. A caller's `level` becomes `extra.level`."""
    record: logging.LogRecord = event.pop("_record")
    event.pop("_from_structlog", None)
    exc_info = event.pop("exc_info", None)
    fields: dict[str, Any] = {
        "@timestamp": timestamp(record.created),
        "level": record.levelname.lower(),
        "message": scrub(str(event.pop("event", ""))),
        "logger": record.name,
        "node_id": node_id,
    }
    for name, value in islice(event.items(), FIELDS_MAX):
        fields[f"extra.{name}" if name in CORE_FIELDS else name] = _named(name, value)
    if isinstance(exc_info, tuple) and exc_info[1] is not None:
        fields |= _error(exc_info[1], exc_info[2])
    return fields


def _error(error: BaseException, where: TracebackType | None) -> dict[str, str]:
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    trace = "".join(traceback.format_exception(kind, error, where)).rstrip()
    if len(trace) > STACK_TRACE_CHARS_MAX:  # the end says what was raised
        trace = f"[cut: {len(trace)} characters] {trace[-STACK_TRACE_CHARS_MAX:]}"
    return {
        "error.type": name,
        "error.message": scrub(_text(error)),
        "error.stack_trace": scrub(trace, len(trace)),
    }


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # an error is worth its line even where its own text fails, as the stack trace does it too
        return f"<{type(error).__name__}>"


def _named(name: str, value: object, depth: int = 0) -> object:
    return REDACTED if _is_secret(name) and value is not None else _plain(value, depth)


@lru_cache(1024)  # names are the program's own; those of a foreign mapping only push others out
def _is_secret(name: str) -> bool:
    return re.split(r"[.\-]", name.lower())[-1] in _SECRET_WORDS


def _plain(value: object, depth: int) -> object:
    """What JSON can hold. Of an unknown object its type alone is told: its repr might hold anything."""
    kind = type(value)
    if kind is str:  # these three are nearly all there is, and the abstract types below are slow to ask
        return scrub(value)  # type: ignore[arg-type]
    if kind is int or kind is bool:
        return value
    match value:
        case StrEnum():
            return value.value
        case Enum():
            return value.name.lower()
        case None | bool():
            return value
        case str():
            return scrub(value)
        case numbers.Integral():
            return int(value)
        case numbers.Real():
            number = float(value)
            return number if abs(number) < float("inf") else str(number)
        case bytes() | bytearray() | memoryview():
            return f"<{len(value)} bytes>"
        case PurePath() | Address():
            return scrub(str(value))
        case BaseException():
            return scrub(f"{type(value).__name__}: {_text(value)}")
        case Mapping() if depth < DEPTH_MAX:
            items = islice(value.items(), ITEMS_MAX)
            return {scrub(str(k)): _named(str(k), v, depth + 1) for k, v in items}
        case list() | tuple() | set() | frozenset() if depth < DEPTH_MAX:
            return _plain_items(value, depth + 1)
    return f"<{type(value).__name__}>"


def _plain_items(values: Iterable[object], depth: int) -> list[object]:
    return [_plain(value, depth) for value in islice(values, ITEMS_MAX)]


def _plain_line(fields: Mapping[str, Any], *, with_colour: bool) -> str:
    def paint(text: str, colour: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if with_colour else text

    level = str(fields["level"])
    local = datetime.fromisoformat(str(fields["@timestamp"])).astimezone()
    words = [
        paint(local.strftime("%H:%M:%S.") + f"{local.microsecond // 1000:03}", "2"),
        paint(f"{level:<8}", _LEVEL_COLOURS.get(level, "0")),
        str(fields["node_id"]),
        _CONTROL.sub(" ", str(fields["message"])),
    ]
    trace = fields.get("error.stack_trace")
    for name, value in fields.items():
        if name not in CORE_FIELDS and name != "error.stack_trace":
            is_bare = isinstance(value, str) and value and not re.search(r'[\s"=]', value) and value.isprintable()
            words.append(paint(f"{_CONTROL.sub(' ', name)}={value if is_bare else _dumps_value(value)}", "2"))
    line = " ".join(words)
    # Escapes within an exception's text must not reach the terminal; its line breaks may.
    return line if trace is None else line + "\n" + "\n".join(_CONTROL.sub(" ", part) for part in trace.split("\n"))


def _dumps_value(value: object) -> str:
    return json.dumps(value, ensure_ascii=True, allow_nan=False)
