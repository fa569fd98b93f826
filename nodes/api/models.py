"""GET /v1/models and /v1/models/{id}: the models of the whole mesh, each once, whichever node has it."""

from __future__ import annotations

from typing import Any

from quart import Quart, Response, jsonify

from mesh.errors import ModelUnknown
from mesh.view import ClusterView, ModelInfo, NodeStatus
from nodes.api.auth import authenticate
from nodes.api.schema import CHARS_SHOWN
from nodes.api.services import Services

# The API wants a time of creation and no node knows it of a model; one constant keeps every node's answer equal.
MODEL_CREATED = 0
OWNER = "ai-cluster"


def register(app: Quart, services: Services) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        caller = await authenticate(services)
        served = served_models(services.view())
        data = [served[name] for name in sorted(served) if caller.may_use(name)]
        return jsonify({"object": "list", "data": data})

    # A name may have slashes, as on the hub.
    @app.get("/v1/models/<path:name>")
    async def model(name: str) -> Response:
        caller = await authenticate(services)
        served = served_models(services.view())
        if name not in served or not caller.may_use(name):
            raise ModelUnknown(
                f"no node of this mesh serves a model named {name[:CHARS_SHOWN]!r}; GET /v1/models lists them"
            )
        return jsonify(served[name])


def served_models(view: ClusterView) -> dict[str, dict[str, Any]]:
    """OpenAI's objects of the models that members not offline have, by name, with the shortest context, which every
    node takes."""
    served: dict[str, dict[str, Any]] = {}
    for member in view.members.values():
        if view.status(member) is not NodeStatus.OFFLINE:
            for info in member.profile.models:
                known = served.setdefault(info.name, _model_object(info))
                known["context_length"] = min(info.context_length, known["context_length"])
    return served


def _model_object(info: ModelInfo) -> dict[str, Any]:
    return {
        "id": info.name,
        "object": "model",
        "created": MODEL_CREATED,
        "owned_by": OWNER,
        "context_length": info.context_length,
        "kind": info.kind,
    }
