"""What a link tells its owner: a closed union of plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Established:
    """The peer has proven that it holds the key; frames may be queued from now on."""

    node_id: str
    boot_id: bytes
    version: int


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """Responder: the peer asks."""

    stream_id: int
    request: bytes


@dataclass(frozen=True, slots=True)
class EventsReceived:
    """Initiator: [stream id, event] pairs in order; ids of streams cancelled meanwhile may occur. load may be empty."""

    events: list[tuple[int, object]]
    load: bytes


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """Initiator: no event of this stream follows. code None: it is complete."""

    stream_id: int
    code: str | None
    message: str
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class StreamCancelled:
    """Responder: the peer wants no more of this stream."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class PongReceived:
    """Answers every ping up to ping_id. load may be empty."""

    ping_id: int
    load: bytes


@dataclass(frozen=True, slots=True)
class LinkClosed:
    """The peer closes the link on purpose; an end without this is a broken link."""


LinkEvent = Established | StreamOpened | EventsReceived | StreamEnded | StreamCancelled | PongReceived | LinkClosed
