"""Which nodes one request leaves out for a while, because they failed it, and whether others are left. Sans-IO."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from mesh.view import ClusterView, MemberView, Readiness

# A node that failed an answer is not tried again with it for so long, doubled with each failure, or until it has begun
# a new life; a node that was full for the shorter time.
EXCLUDED_S = 2.0
EXCLUDED_FULL_S = 0.5


@dataclass(slots=True)
class _Exclusion:
    """generation: of the life that failed."""

    generation: int
    until: float
    seconds: float


class Exclusions:
    """Of one answer: at most one a member."""

    def __init__(self) -> None:
        self._by_id: dict[str, _Exclusion] = {}

    def add(self, member: MemberView, seconds: float, now: float) -> None:
        """seconds: at least; twice as long as the last time."""
        before = self._by_id.get(member.node_id)
        if before is not None and before.generation == member.generation:
            seconds = max(seconds, 2 * before.seconds)
        self._by_id[member.node_id] = _Exclusion(member.generation, now + seconds, seconds)

    def ids(self, view: ClusterView, now: float) -> frozenset[str]:
        """Who is left out now: members whose life is the one that failed."""
        return frozenset(
            node_id
            for node_id, exclusion in self._by_id.items()
            if now < exclusion.until
            and (member := view.members.get(node_id)) is not None
            and member.generation == exclusion.generation
        )


def others_left(view: ClusterView, model: str, excluded: AbstractSet[str]) -> bool:
    """Beside those left out, a node is ready with the model, if full, or loads it."""
    return any(
        member.is_live
        and member.load.readiness in (Readiness.READY, Readiness.LOADING)
        and member.model(model) is not None
        and member.node_id not in excluded
        for member in view.members.values()
    )
