"""`ai_cluster_cluster_*`: the cluster as this node sees it, from gossip. Labels name the subject, never who observes.

Only members of now have rows: a gauge kept per peer would go on telling of nodes that are gone.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from mesh.view import MemberStatus, MemberView, NodeStatus
from observability.collectors import KeyLimit, Snapshot
from observability.families import LABEL_VALUES_MAX, PairFigures, by_node, gauge

# A key whose use of a limit is this much of it, or more, is near it.
NEAR_LIMIT = 0.8


class ClusterCollector(Collector):
    """Reads the snapshot's view and its key limits."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._view = snapshot.view

    def collect(self) -> Iterable[Metric]:
        view, snapshot = self._view, self._snapshot
        members = [view.members[node_id] for node_id in sorted(view.members)]
        known = [member for member in members if member.status is not MemberStatus.LEFT]
        # The last load of a dead member says nothing of now.
        loaded = [member for member in known if member.status is not MemberStatus.DEAD]
        peers = [member for member in known if not member.is_self]

        counts = {status.value: count for status, count in view.counts().items()}
        yield gauge("cluster_nodes_total", "Members by status, as this node sees them.", ("status",), counts)
        expected = len(known) if snapshot.nodes_expected is None else snapshot.nodes_expected
        yield gauge("cluster_nodes_expected", "Nodes this cluster should have.", (), expected)
        yield gauge("cluster_view_hash", "Equal at nodes that hold the same members to be there.", (), view.hash())
        disagreeing = len(view.disagreeing())
        yield gauge("cluster_views_disagreeing", "Live peers that told of another view last.", (), disagreeing)
        yield by_node(
            "cluster_active_requests", "Generations a node executes; the own row is live.", loaded, self._active, sum
        )
        yield by_node(
            "cluster_tokens_per_second", "Tokens a node generated per second, last 10 s.", loaded, self._tokens, sum
        )
        yield by_node("cluster_queue_depth", "Requests that wait for a slot at a node.", loaded, self._queued, sum)
        yield by_node("cluster_free_slots", "Slots free at a node.", loaded, self._free_slots, sum)
        yield by_node("cluster_loop_lag_seconds", "How late a node's event loop woke up.", loaded, self._lag, max)
        yield by_node("cluster_peer_healthy", "1 where a peer is healthy, else 0.", peers, self._healthy, min)
        yield by_node(
            "cluster_peer_last_seen_age_seconds",
            "Seconds since a peer's state last advanced, on the observer's monotonic clock.",
            peers,
            lambda member: member.age_s,
            max,
        )
        yield from self._limits(snapshot.limits)
        yield gauge("gossip_awareness", "Lifeguard score of this node itself: 0 is well, 8 worst.", (), view.awareness)

    def _limits(self, limits: Iterable[KeyLimit]) -> Iterable[Metric]:
        allowed: PairFigures = {}
        used: PairFigures = {}
        key_ids: set[str] = set()
        near: set[str] = set()
        for row in limits:
            if row.used >= NEAR_LIMIT * row.limit:
                near.add(row.key_id)
            if row.key_id not in key_ids and len(key_ids) >= LABEL_VALUES_MAX:
                # Limits of different keys have no meaningful sum: what is beyond shows in the count alone.
                continue
            key_ids.add(row.key_id)
            allowed[row.key_id, row.kind], used[row.key_id, row.kind] = row.limit, row.used
        labels = ("key_id", "kind")
        yield gauge("cluster_api_key_limit", "Limits of API keys, over all nodes together.", labels, allowed)
        yield gauge("cluster_api_key_limit_used", "How much of them is used, as this node has heard.", labels, used)
        yield gauge("cluster_api_keys_near_limit", "Keys that have used four fifths of a limit.", (), len(near))

    def _own_engines(self, member: MemberView, name: str) -> float | None:
        if not member.is_self:
            return None
        return sum(float(getattr(engine, name)) for engine in self._snapshot.engines.values())

    def _active(self, member: MemberView) -> float:
        return self._snapshot.active_requests if member.is_self else member.load.active_requests

    def _tokens(self, member: MemberView) -> float:
        own = self._own_engines(member, "tokens_per_s")
        return member.load.tokens_per_s if own is None else own

    def _queued(self, member: MemberView) -> float:
        own = self._own_engines(member, "queued")
        return sum(load.queued for load in member.load.models.values()) if own is None else own

    def _free_slots(self, member: MemberView) -> float:
        own = self._own_engines(member, "free_slots")
        return sum(load.free_slots for load in member.load.models.values()) if own is None else own

    def _lag(self, member: MemberView) -> float:
        return self._snapshot.loop_lag_s if member.is_self else member.load.loop_lag_s

    def _healthy(self, member: MemberView) -> float:
        return 1.0 if self._view.status(member) is NodeStatus.HEALTHY else 0.0
