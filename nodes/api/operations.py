"""What operators and programs ask of a node itself: health, metrics. nodes.api.cluster answers for all of them."""

from __future__ import annotations

from typing import Any

from quart import Quart, Response, jsonify, request

from mesh.view import ClusterView, Readiness
from nodes.api.services import Services
from observability.metrics import Exposition


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

    @app.get("/metrics")
    async def metrics() -> Response:
        headers = request.headers
        return _answer(await services.render_metrics(headers.get("accept", ""), headers.get("accept-encoding", "")))

    @app.get("/metrics/cluster")
    async def cluster_metrics() -> Response:
        return _answer(await services.render_cluster_metrics(request.headers.get("accept-encoding", "")))


def _answer(exposition: Exposition) -> Response:
    headers = {"vary": "accept, accept-encoding"}
    if exposition.content_encoding:
        headers["content-encoding"] = exposition.content_encoding
    return Response(exposition.body, 200, headers, content_type=exposition.content_type)


def _health(services: Services, view: ClusterView) -> dict[str, Any]:
    me = view.me
    return {
        "status": me.load.readiness.value,
        "node_id": services.node_id,
        "version": services.version,
        "models": [model.name for model in me.profile.models],
        "active_requests": me.load.active_requests,
    }
