"""W3C Trace Context: which trace a request belongs to, and which span of it asked. Sees no clock and no network.

A traceparent names the trace, the span that asked and whether it is sampled; a tracestate is what tracing systems pass
on beside it. What cannot be read is none: a fault of a header never fails a request.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

SAMPLED = 0x01
RANDOM = 0x02  # the trace id was drawn at random (level 2)
KNOWN_FLAGS = SAMPLED | RANDOM  # others are for later versions, and not passed on
# What the standard asks everyone to pass on at least; whole members beyond it are left out.
STATE_CHARS_MAX = 512
STATE_MEMBERS_MAX = 32
STATE_CHARS_READ_MAX = 16 * 1024  # as much as an HTTP head has; a peer's message could hold megabytes
MEMBER_CHARS_LONG = 128  # members longer than this are the first to be left out
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)
_MEMBER = re.compile(r"(?:[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})=[ -~]{0,256}")


@dataclass(frozen=True, slots=True)
class TraceContext:
    """trace_id: 32 and span_id: 16 lower-case hex digits, neither all zeros. flags: KNOWN_FLAGS at most. state: a
    tracestate of at most STATE_CHARS_MAX characters; often empty."""

    trace_id: str
    span_id: str
    flags: int = 0
    state: str = ""

    @property
    def is_sampled(self) -> bool:
        return bool(self.flags & SAMPLED)

    @property
    def traceparent(self) -> str:
        """As version 00 writes it."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"


def parse_trace_context(traceparent: str, tracestate: str = "") -> TraceContext | None:
    """None for what is no traceparent. Of a later version what version 00 has is read. A tracestate that is none is
    left out alone."""
    found = _TRACEPARENT.fullmatch(traceparent)
    if found is None:
        return None
    version, trace_id, span_id, flags, rest = found.groups()
    if version == "ff" or (version == "00" and rest is not None):
        return None
    if not trace_id.strip("0") or not span_id.strip("0"):
        return None
    return TraceContext(trace_id, span_id, int(flags, 16) & KNOWN_FLAGS, _bounded_state(tracestate))


def context_of_headers(headers: Iterable[tuple[bytes, bytes]]) -> TraceContext | None:
    """Of an HTTP request's headers, names in lower case. Two traceparents are none."""
    parents: list[bytes] = []
    states: list[bytes] = []
    for name, value in headers:
        if name == b"traceparent":
            parents.append(value)
        elif name == b"tracestate":
            states.append(value)
    if len(parents) != 1:
        return None
    return parse_trace_context(parents[0].decode("latin-1").strip(), b",".join(states).decode("latin-1"))


def _bounded_state(text: str) -> str:
    """The members in their order, the longest of them and then the last left out where they are too long together.
    Empty where one is none, a key comes twice, or they are too many: half a list could mislead whoever wrote it."""
    if not text or len(text) > STATE_CHARS_READ_MAX:
        return ""
    members = [member for part in text.split(",") if (member := part.strip(" \t"))]
    keys = {member.partition("=")[0] for member in members}
    if len(members) > STATE_MEMBERS_MAX or len(keys) < len(members) or not all(map(_is_member, members)):
        return ""
    if _length(members) > STATE_CHARS_MAX:
        members = [member for member in members if len(member) <= MEMBER_CHARS_LONG]
    while _length(members) > STATE_CHARS_MAX:
        members.pop()
    return ",".join(members)


def _is_member(text: str) -> bool:
    return _MEMBER.fullmatch(text) is not None and "=" not in text.partition("=")[2]


def _length(members: list[str]) -> int:
    return sum(map(len, members)) + len(members) - 1
