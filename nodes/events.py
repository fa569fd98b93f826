"""What has happened in the mesh lately, as this node saw it: a bounded ring that any number of readers follow.

Sees no socket and no clock. Equal events close together are one with a count, so that the failover of a thousand
streams is a line and not a flood. A reader keeps a revision, not a queue: whoever reads slowly costs nothing, and
misses what has left the ring.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mesh.view import ClusterView, MemberStatus, MemberView

EVENTS_MAX = 256
# Events of one kind about the same within so long are one.
COALESCE_S = 10.0

# joined, left, suspect, dead, back: membership. readiness: loading, ready, draining, failed. degraded, healthy: what
# operators see. model: one more is served. failover, hedge, retry: an answer went on, was raced, or began elsewhere.
Kind = Literal[
    "joined",
    "left",
    "suspect",
    "dead",
    "back",
    "forgotten",
    "readiness",
    "degraded",
    "healthy",
    "model",
    "failover",
    "hedge",
    "retry",
]


@dataclass(frozen=True, slots=True)
class Happening:
    """node_id: whom it is about; of a move where the answer goes on. origin: of a move, where it was. reason: why, in a
    few words; of `model` its name, of `readiness` the new one."""

    kind: Kind
    node_id: str
    reason: str = ""
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """number: of the event, from 1, the same while count grows. revision: grows with each change of any event.
    at: seconds since 1970, of the latest."""

    number: int
    revision: int
    at: float
    happening: Happening
    count: int = 1


class EventLog:
    """The ring. Times are seconds of one clock that its caller chooses; now never decreases by much."""

    def __init__(self, size: int = EVENTS_MAX, coalesce_s: float = COALESCE_S) -> None:
        self._size = size
        self._coalesce_s = coalesce_s
        self._events: OrderedDict[int, Event] = OrderedDict()  # by number, in the order of their revisions
        self._latest: dict[Happening, int] = {}  # of those in the ring
        self._numbers = 0
        self.revision = 0

    def add(self, happening: Happening, now: float) -> Event:
        self.revision += 1
        former = self._events.get(self._latest.get(happening, 0))
        if former is not None and abs(now - former.at) < self._coalesce_s:
            event = Event(former.number, self.revision, now, happening, former.count + 1)
        else:
            self._numbers += 1
            event = Event(self._numbers, self.revision, now, happening)
        self._events[event.number] = event
        self._events.move_to_end(event.number)
        self._latest[happening] = event.number
        if len(self._events) > self._size:
            number, oldest = self._events.popitem(last=False)
            if self._latest.get(oldest.happening) == number:
                del self._latest[oldest.happening]
        return event

    def since(self, revision: int) -> list[Event]:
        """What is in the ring and has changed after that revision, oldest change first."""
        found = []
        for event in reversed(self._events.values()):
            if event.revision <= revision:
                break
            found.append(event)
        return found[::-1]


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a later picture of a member is compared with."""

    status: MemberStatus
    readiness: str
    complaint: str
    models: frozenset[str]


@dataclass(slots=True)
class ViewWatch:
    """Tells what has changed from one picture of the mesh to the next. The first one tells nothing."""

    _seen: Mapping[str, _Seen] = field(default_factory=dict)
    _has_begun: bool = False

    def observe(self, view: ClusterView) -> list[Happening]:
        found: list[Happening] = []
        now = {node_id: _picture(view, member) for node_id, member in view.members.items()}
        if self._has_begun:
            for node_id, after in now.items():
                found += _changes(node_id, self._seen.get(node_id), after)
            found += [Happening("forgotten", node_id) for node_id in self._seen if node_id not in now]
        self._seen, self._has_begun = now, True
        return found


_STATUS_KINDS: Mapping[MemberStatus, Kind] = {
    MemberStatus.SUSPECT: "suspect",
    MemberStatus.DEAD: "dead",
    MemberStatus.LEFT: "left",
}


def _picture(view: ClusterView, member: MemberView) -> _Seen:
    # A model without a fingerprint still loads.
    models = frozenset(model.name for model in member.profile.models if model.fingerprint)
    return _Seen(member.status, member.load.readiness.value, view.complaint(member), models)


def _changes(node_id: str, before: _Seen | None, after: _Seen) -> list[Happening]:
    is_here = after.status in (MemberStatus.ALIVE, MemberStatus.SUSPECT)
    found: list[Happening] = []
    if before is None:
        # Who was gone before this node came is no news.
        return [Happening("joined", node_id, after.readiness)] if is_here else []
    if after.status is not before.status:
        kind = _STATUS_KINDS.get(after.status)
        was = "" if kind else before.status.name.lower()
        found.append(Happening(kind or "back", node_id, was))
    if not is_here:
        return found
    found += [Happening("model", node_id, name) for name in sorted(after.models - before.models)]
    if after.readiness != before.readiness:
        found.append(Happening("readiness", node_id, after.readiness))
    was_here = before.status in (MemberStatus.ALIVE, MemberStatus.SUSPECT)
    if was_here and after.complaint != before.complaint and after.status is MemberStatus.ALIVE:
        # What membership and readiness have said already is not said twice.
        if not after.complaint and not found:
            found.append(Happening("healthy", node_id, before.complaint))
        elif after.complaint and after.complaint != after.readiness:
            found.append(Happening("degraded", node_id, after.complaint))
    return found
