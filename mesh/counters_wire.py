"""The usage section of a node's state as bytes: its totals per API key. What a peer says of usage is checked here.

A section is one msgpack array [generation, sequence], then one array per key to the end, [key, requests, prompt tokens,
completion tokens, running, reserved tokens, recent requests, recent tokens]. Arrays may be longer than this version
knows: what follows is ignored. A row of a usual key takes 30 to 50 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from mesh.errors import MalformedDatagram
from mesh.wire import SECTION_BYTES_MAX, count, text

USAGE_BYTES_MAX = 600  # of a section that is published: with a hot section it fits one datagram
KEY_BYTES_MAX = 64  # the public id of an API key
SECTION_ROWS_MAX = 64  # more than fit, but for keys of a few letters
TOTAL_MAX = 2**53  # a million tokens a second for 285 years; sums of some stay below COUNT_MAX


@dataclass(frozen=True, slots=True)
class Totals:
    """Requests and tokens since the beginning of a generation."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def plus(self, other: Totals) -> Totals:
        return Totals(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )

    def maximum(self, other: Totals) -> Totals:
        return Totals(
            max(self.requests, other.requests),
            max(self.prompt_tokens, other.prompt_tokens),
            max(self.completion_tokens, other.completion_tokens),
        )


NO_TOTALS = Totals()


@dataclass(frozen=True, slots=True)
class Report:
    """What a node says of one key. recent_requests, recent_tokens: how much of the totals is of its last minute.

    reserved_tokens: what running requests may still use, beyond the totals."""

    key: str
    totals: Totals
    running: int = 0
    reserved_tokens: int = 0
    recent_requests: int = 0
    recent_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """One section. sequence: rises with each publication of a generation."""

    generation: int
    sequence: int
    reports: tuple[Report, ...]


def encode_usage(usage: Usage) -> bytes:
    """The caller keeps it within SECTION_BYTES_MAX."""
    return b"".join([encode_head(usage.generation, usage.sequence), *map(encode_report, usage.reports)])


def encode_head(generation: int, sequence: int) -> bytes:
    """A section without reports; encoded reports are appended to it."""
    encoded: bytes = msgpack.packb([generation, sequence])
    return encoded


def encode_report(report: Report) -> bytes:
    totals = report.totals
    encoded: bytes = msgpack.packb(
        [
            report.key,
            totals.requests,
            totals.prompt_tokens,
            totals.completion_tokens,
            report.running,
            report.reserved_tokens,
            report.recent_requests,
            report.recent_tokens,
        ]
    )
    return encoded


def decode_usage(section: bytes) -> Usage:
    """Raises MalformedDatagram."""
    if len(section) > SECTION_BYTES_MAX:
        raise MalformedDatagram(f"a usage section of {len(section)} bytes exceeds {SECTION_BYTES_MAX}")
    unpacker = msgpack.Unpacker(strict_map_key=True, max_buffer_size=SECTION_BYTES_MAX)
    unpacker.feed(section)
    try:
        head = _array(unpacker.unpack(), 2)
        reports = []
        while unpacker.tell() < len(section):
            reports.append(_report(_array(unpacker.unpack(), 8)))
    except (msgpack.UnpackException, ValueError) as exc:  # ValueError: bad UTF-8, bad format, nested too deep
        raise MalformedDatagram(f"a usage section of {len(section)} bytes is no msgpack: {exc!r}") from exc
    if len(reports) > SECTION_ROWS_MAX:
        raise MalformedDatagram(f"a usage section of {len(reports)} keys exceeds {SECTION_ROWS_MAX}")
    return Usage(count(head[0]), count(head[1]), tuple(reports))


def _report(fields: Sequence[Any]) -> Report:
    totals = Totals(count(fields[1], TOTAL_MAX), count(fields[2], TOTAL_MAX), count(fields[3], TOTAL_MAX))
    return Report(
        key=text(fields[0], KEY_BYTES_MAX),
        totals=totals,
        running=count(fields[4], TOTAL_MAX),
        reserved_tokens=count(fields[5], TOTAL_MAX),
        recent_requests=count(fields[6], totals.requests),
        recent_tokens=count(fields[7], totals.tokens),
    )


def _array(value: Any, length_min: int) -> Sequence[Any]:
    if not isinstance(value, list) or len(value) < length_min:
        raise MalformedDatagram(f"expected an array of at least {length_min}, got a {type(value).__name__}")
    return value
