"""What every live member believes of every other: asked over peer links, for whoever looks at the mesh.

An answer is kept for VIEWS_S, however many look, and nothing is asked while nobody does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import msgpack
import trio

from mesh.errors import MeshError
from mesh.view import ClusterView, MemberStatus, MemberView

QUESTION_VIEW = "view"
VIEWS_S = 4.0
# In a larger mesh so many members are asked, those after this node by name: each node's page shows others.
OBSERVERS_MAX = 64
ASKED_AT_ONCE_MAX = 16
ANSWER_TIMEOUT_S = 2.0
# Members told in one answer; at about 40 bytes each they fit one event of a link.
MEMBERS_TOLD_MAX = 4_096

Ask = Callable[[MemberView, bytes], Awaitable[bytes]]
_STATUSES = frozenset(status.name.lower() for status in MemberStatus)


@dataclass(frozen=True, slots=True)
class Views:
    """statuses: by observer, by member: alive, suspect, dead, left. silent: observers that gave no answer. disputed:
    members of which not all observers believe the same; who is unknown to one of them is disputed too."""

    statuses: Mapping[str, Mapping[str, str]]
    silent: tuple[str, ...]
    disputed: tuple[str, ...]


class MemberViews:
    """ask: one peer, with the question's bytes."""

    def __init__(self, view: Callable[[], ClusterView], ask: Ask) -> None:
        self._view = view
        self._ask = ask
        self._lock = trio.Lock()
        self._views: Views | None = None
        self._taken_at = 0.0

    async def answer(self, question: bytes) -> bytes:
        """To a peer that asks."""
        await trio.lowlevel.checkpoint()
        packed: bytes = msgpack.packb(beliefs(self._view()))
        return packed

    async def views(self) -> Views:
        """At most VIEWS_S old."""
        async with self._lock:
            now = trio.current_time()
            if self._views is None or now - self._taken_at >= VIEWS_S:
                self._views, self._taken_at = await self._take(), now
            return self._views

    async def _take(self) -> Views:
        view = self._view()
        statuses = {view.self_id: beliefs(view)}
        silent: list[str] = []
        limit = trio.CapacityLimiter(ASKED_AT_ONCE_MAX)

        async def ask(member: MemberView) -> None:
            told = None
            async with limit:
                with trio.move_on_after(ANSWER_TIMEOUT_S):
                    try:
                        told = _parse(await self._ask(member, b""))
                    except MeshError:  # gossip finds out what is wrong with it; here it is shown as silent
                        told = None
            if told is None:
                silent.append(member.node_id)
            else:
                statuses[member.node_id] = told

        async with trio.open_nursery() as nursery:
            for member in _observers(view):
                nursery.start_soon(ask, member)
        return Views(dict(sorted(statuses.items())), tuple(sorted(silent)), disputed(statuses))


def beliefs(view: ClusterView) -> dict[str, str]:
    return {node_id: view.members[node_id].status.name.lower() for node_id in sorted(view.members)[:MEMBERS_TOLD_MAX]}


def disputed(statuses: Mapping[str, Mapping[str, str]]) -> tuple[str, ...]:
    """Members of which two observers believe different things. Gone is gone, whether it died, left or was forgotten."""
    members = {node_id for told in statuses.values() for node_id in told}
    return tuple(
        sorted(node_id for node_id in members if len({_presence(told.get(node_id)) for told in statuses.values()}) > 1)
    )


def _presence(status: str | None) -> str:
    return "gone" if status in (None, "dead", "left") else str(status)


def _observers(view: ClusterView) -> list[MemberView]:
    peers = [
        member
        for member in view.members.values()
        if not member.is_self and member.status in (MemberStatus.ALIVE, MemberStatus.SUSPECT)
    ]
    peers.sort(key=lambda member: (member.node_id < view.self_id, member.node_id))
    return peers[:OBSERVERS_MAX]


def _parse(data: bytes) -> dict[str, str] | None:
    """None for what this version cannot read."""
    try:
        told = msgpack.unpackb(data)
    except (msgpack.UnpackException, ValueError, TypeError):
        return None
    if not isinstance(told, dict) or len(told) > MEMBERS_TOLD_MAX:
        return None
    if not all(isinstance(node_id, str) and status in _STATUSES for node_id, status in told.items()):
        return None
    return told
