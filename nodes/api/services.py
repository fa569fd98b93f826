"""What the API needs of the node around it, handed over once by the composition root."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from mesh.view import ClusterView
from nodes.access.gate import Gate
from nodes.access.key_admin import KeyAdmin
from nodes.api.admin_access import AdminAccess
from nodes.dispatch import Dispatch
from nodes.embedding_dispatch import EmbeddingDispatch
from nodes.event_feed import EventFeed
from nodes.member_views import MemberViews
from nodes.mesh_operations import MeshOperations
from observability.metrics import Exposition
from observability.tracing import NO_TRACING, Tracer


class ApiMetrics(Protocol):
    """The counters that the entry node keeps; observability.metrics.Metrics is the real one."""

    def http_request(
        self, method: str, path: str, status: int, seconds: float, exemplar: Mapping[str, str] | None = None
    ) -> None: ...
    def api_key_request(self, key_id: str, status: str) -> None: ...
    def rate_limited(self, key_id: str) -> None: ...
    def streaming_finished(self, model: str, status: str, seconds: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Services:
    """view is instant; render_metrics takes the headers Accept and Accept-Encoding, render_cluster_metrics the second;
    these do their work in worker threads. tracer: of the requests that models answer."""

    node_id: str
    version: str
    cluster_name: str
    gate: Gate
    dispatch: Dispatch
    embeddings: EmbeddingDispatch
    view: Callable[[], ClusterView]
    metrics: ApiMetrics
    render_metrics: Callable[[str, str], Awaitable[Exposition]]
    render_cluster_metrics: Callable[[str], Awaitable[Exposition]]
    deadline_s: float
    body_bytes_max: int
    nodes_expected: int | None
    admin_access: AdminAccess
    operations: MeshOperations
    key_admin: KeyAdmin
    events: EventFeed
    member_views: MemberViews
    cors_origins: Sequence[str] = ()
    tracer: Tracer = NO_TRACING
