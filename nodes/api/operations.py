"""What operators and programs ask of a node: health, the cluster's status, metrics."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from quart import Quart, Response, jsonify, request

from mesh.view import ClusterView, MemberStatus, MemberView, NodeStatus, Readiness
from nodes.api.services import Services


def register(app: Quart, services: Services) -> None:
    @app.get("/health")
    @app.get("/health/ready")
    async def ready() -> tuple[Response, int]:
        view = services.view()
        is_ready = view.me.load.readiness is Readiness.READY
        return jsonify(_health(services, view)), 200 if is_ready else 503

    @app.get("/health/live")
    async def live() -> tuple[Response, int]:
        view = services.view()
        is_alive = view.me.load.readiness is not Readiness.FAILED
        return jsonify(_health(services, view)), 200 if is_alive else 503

    @app.get("/cluster/status")
    async def cluster_status() -> Response:
        return jsonify(_cluster_status(services, services.view()))

    @app.get("/metrics")
    async def metrics() -> Response:
        content_type, body = await services.render_metrics(request.headers.get("accept", ""))
        return Response(body, 200, content_type=content_type)


def _health(services: Services, view: ClusterView) -> dict[str, Any]:
    me = view.me
    return {
        "status": me.load.readiness.value,
        "node_id": services.node_id,
        "version": services.version,
        "models": [model.name for model in me.profile.models],
        "active_requests": me.load.active_requests,
    }


def _cluster_status(services: Services, view: ClusterView) -> dict[str, Any]:
    counts = view.counts()
    known = sum(1 for member in view.members.values() if member.status is not MemberStatus.LEFT)
    return {
        "node_id": services.node_id,
        "cluster_name": services.cluster_name,
        "version": services.version,
        "nodes": {status.value: count for status, count in counts.items()},
        "nodes_expected": services.nodes_expected or known,
        "warnings": _warnings(view),
        "members": [_member(view, view.members[node_id]) for node_id in sorted(view.members)],
    }


def _member(view: ClusterView, member: MemberView) -> dict[str, Any]:
    return {
        "node_id": member.node_id,
        "status": view.status(member).value,
        "membership": member.status.name.lower(),
        "readiness": member.load.readiness.value,
        "is_self": member.is_self,
        "mesh": str(member.address),
        "http": member.profile.http_address,
        "version": member.profile.version,
        "generation": member.generation,
        "age_s": round(member.age_s, 3),
        "active_requests": member.load.active_requests,
        "tokens_per_s": round(member.load.tokens_per_s, 1),
        "prefix_digest_bytes": len(member.bulk),
        "models": [
            {"name": model.name, "fingerprint": model.fingerprint, "context_length": model.context_length}
            | _load(member, model.name)
            for model in member.profile.models
        ],
    }


def _load(member: MemberView, name: str) -> dict[str, int]:
    load = member.load.models.get(name)
    return {} if load is None else {"active": load.active, "queued": load.queued, "free_slots": load.free_slots}


def _warnings(view: ClusterView) -> list[str]:
    """What an operator should mend: models that differ under one name."""
    fingerprints: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for member in view.members.values():
        if view.status(member) is not NodeStatus.OFFLINE:
            for model in filter(lambda model: model.fingerprint, member.profile.models):
                fingerprints[model.name][model.fingerprint].append(member.node_id)
    return [
        f"model {name!r} differs between nodes: "
        + "; ".join(f"{', '.join(sorted(nodes))} have {fingerprint}" for fingerprint, nodes in sorted(kinds.items()))
        for name, kinds in sorted(fingerprints.items())
        if len(kinds) > 1
    ]
