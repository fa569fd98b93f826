"""Which nodes this one has seen accept streams and make no progress, whatever they report of themselves. Sans-IO.

A node hangs with a model when its engine has work and its step counter, in reports that are fresh, stands still for
HANG_STEPS of its own steps and at least HANG_MIN_S. Slow tokens alone are no hang: a loaded engine's counter moves.
A node whose reports are not fresh is not judged here; its link is, by its pings.

Who hung is degraded until it serves a probe, one short generation, or begins a new life.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from mesh.view import ClusterView, MemberStatus, MemberView

HANG_MIN_S = 2.0
HANG_STEPS = 20
# Before a step was measured: a device may compile its kernels in the first one.
HANG_FIRST_S = 30.0
# Reports ride on the pings of a link with streams, each 0.5 s; one older than this may be from before a step ended.
REPORT_FRESH_S = 1.2
# Between the verdict and the first probe, and between two probes of one node.
PROBE_INTERVAL_S = 2.0

# A node and a model on it.
Place = tuple[str, str]


@dataclass(slots=True)
class _Progress:
    step_count: int
    since: float


@dataclass(slots=True)
class _Degraded:
    """generation: of the life that hung. model: what it hung with."""

    generation: int
    model: str
    probe_at: float


class Witness:
    """Keeps as many places as are in use, and as many degraded nodes as there are members."""

    def __init__(self) -> None:
        self._progress: dict[Place, _Progress] = {}
        self._degraded: dict[str, _Degraded] = {}

    def observe(self, places: Collection[Place], view: ClusterView, now: float) -> list[Place]:
        """Which of the places in use hang now. To be called several times a second with all of them."""
        self._progress = {place: self._progress[place] for place in places if place in self._progress}
        self._forget_restarted(view)
        return [place for place in places if self._hangs(place, view, now)]

    def _hangs(self, place: Place, view: ClusterView, now: float) -> bool:
        node_id, model = place
        member = view.members.get(node_id)
        load = None if member is None else member.load.models.get(model)
        if member is None or load is None or not load.active:
            self._progress.pop(place, None)
            return False
        progress = self._progress.get(place)
        if progress is None or progress.step_count != load.step_count:
            self._progress[place] = _Progress(load.step_count, now)
            return False
        limit_s = max(HANG_MIN_S, HANG_STEPS * load.step_s) if load.step_s else HANG_FIRST_S
        if now - progress.since < limit_s or member.load_age_s > REPORT_FRESH_S:
            return False
        if node_id not in self._degraded:
            self._degraded[node_id] = _Degraded(member.generation, model, now + PROBE_INTERVAL_S)
        return True

    def _forget_restarted(self, view: ClusterView) -> None:
        for node_id, degraded in list(self._degraded.items()):
            member = view.members.get(node_id)
            if member is None or member.generation != degraded.generation or member.status is MemberStatus.LEFT:
                del self._degraded[node_id]

    @property
    def degraded(self) -> frozenset[str]:
        """Node ids."""
        return frozenset(self._degraded)

    def probes_due(self, view: ClusterView, now: float) -> Iterator[tuple[MemberView, str]]:
        """Whom to ask for a probe generation now, of which model; each counts as asked."""
        for node_id, degraded in self._degraded.items():
            member = view.members.get(node_id)
            if now >= degraded.probe_at and member is not None and member.status is MemberStatus.ALIVE:
                degraded.probe_at = now + PROBE_INTERVAL_S
                yield member, degraded.model

    def served(self, node_id: str) -> bool:
        """The node has generated a token for this one. True where it was degraded."""
        return self._degraded.pop(node_id, None) is not None
