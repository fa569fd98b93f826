"""Whether the mesh has the model that a request names, of the kind its endpoint needs, and the caller may use it."""

from __future__ import annotations

from functools import partial

from mesh.errors import ModelUnknown
from mesh.view import EMBEDDING, GENERATION, ClusterView
from nodes.access.gate import Caller
from nodes.api.schema import CHARS_SHOWN
from nodes.api.services import Services
from nodes.generation import RequestInvalid

ENDPOINTS = {GENERATION: "POST /v1/chat/completions or /v1/completions", EMBEDDING: "POST /v1/embeddings"}
MODELS_NAMED_MAX = 4  # in an error message


def is_served(view: ClusterView, model: str) -> bool:
    """Some live node has it."""
    return any(member.is_live and member.model(model) is not None for member in view.members.values())


def context_length_of(services: Services, caller: Caller, model: str, kind: str) -> int:
    """Of the nodes that have it the longest context. Raises Forbidden, ModelUnknown, and RequestInvalid for a model of
    another kind."""
    view = services.view()
    services.gate.check_model(caller, model, partial(is_served, view))
    infos = [info for member in view.members.values() if (info := member.model(model)) is not None]
    if not infos:
        raise ModelUnknown(f"no node of this mesh has a model named {model[:CHARS_SHOWN]!r}; GET /v1/models lists them")
    lengths = [info.context_length for info in infos if info.kind == kind]
    if not lengths:
        other = infos[0].kind
        endpoint = ENDPOINTS.get(other, "another version of AI Cluster")
        message = f"{model[:CHARS_SHOWN]!r} is a model for {other}, which this endpoint does not do; ask {endpoint}"
        raise RequestInvalid(f"{message}; {_able(view, caller, kind)}", param="model")
    return max(lengths)


def _able(view: ClusterView, caller: Caller, kind: str) -> str:
    """Which models do what the endpoint does, for a message."""
    infos = [info for member in view.members.values() if member.is_live for info in member.profile.models]
    names = sorted({info.name for info in infos if info.kind == kind and caller.may_use(info.name)})
    if not names:
        return f"no node has a model for {kind}"
    named = ", ".join(repr(name[:CHARS_SHOWN]) for name in names[:MODELS_NAMED_MAX])
    more = ", …" if len(names) > MODELS_NAMED_MAX else ""
    return f"models for {kind} are {named}{more}"
