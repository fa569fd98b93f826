"""GET /v1/models and /v1/models/{id}: the models of the whole mesh, each once, whichever node has it."""

from __future__ import annotations

from typing import Any

from quart import Quart, Response, jsonify

from mesh.errors import ModelUnknown
from mesh.view import ClusterView, NodeStatus
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
        lengths = context_lengths(services.view())
        lengths = {name: length for name, length in lengths.items() if caller.may_use(name)}
        return jsonify({"object": "list", "data": [_model_object(name, lengths[name]) for name in sorted(lengths)]})

    # A name may have slashes, as on the hub.
    @app.get("/v1/models/<path:name>")
    async def model(name: str) -> Response:
        caller = await authenticate(services)
        lengths = context_lengths(services.view())
        if name not in lengths or not caller.may_use(name):
            raise ModelUnknown(
                f"no node of this mesh serves a model named {name[:CHARS_SHOWN]!r}; GET /v1/models lists them"
            )
        return jsonify(_model_object(name, lengths[name]))


def context_lengths(view: ClusterView) -> dict[str, int]:
    """By the names of the models that members not offline have: the shortest context, which every node takes."""
    lengths: dict[str, int] = {}
    for member in view.members.values():
        if view.status(member) is not NodeStatus.OFFLINE:
            for model in member.profile.models:
                lengths[model.name] = min(model.context_length, lengths.get(model.name, model.context_length))
    return lengths


def _model_object(name: str, context_length: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": MODEL_CREATED,
        "owned_by": OWNER,
        "context_length": context_length,
    }
