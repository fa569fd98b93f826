"""The description of the API: /openapi.json, made of the types that check requests, and /docs, which shows it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from quart import Quart, Response

from nodes.api import admin, keys
from nodes.api.answer_schema import (
    ChatCompletion,
    ChatCompletionChunk,
    ClusterEvent,
    ClusterStatus,
    ClusterViews,
    Completion,
    EditedKey,
    EmbeddingList,
    ErrorAnswer,
    Health,
    KeyList,
    KeyObject,
    ModelList,
    ModelObject,
    ScrapeTargets,
    UsageAnswer,
)
from nodes.api.chat_schema import ChatCompletionRequest
from nodes.api.completion_schema import CompletionRequest
from nodes.api.docs_page import docs_page
from nodes.api.embedding_schema import EmbeddingRequest
from nodes.api.services import Services

OPENAPI_VERSION = "3.1.0"
REF = "#/components/schemas/{model}"
JSON = "application/json"
EVENTS = "text/event-stream"
LINES = "application/x-ndjson"
# The page is made here and has no script; nothing else may be loaded by it.
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
}

ERRORS = {
    400: "The request is not valid; `param` names the field",
    401: "No API key that this node takes",
    403: "The key may not use this model",
    404: "No node has the model, or there is no such path",
    408: "The body did not come in time",
    409: "The mesh has no such node",
    413: "The body is larger than this node accepts",
    429: "A limit of the key, or too many wrong ones from this address; `retry-after` says when to come back",
    415: "The body's content type is not JSON, or it is compressed",
    500: "A fault of the node; the log has it under the request id",
    502: "The node that generated failed, and no other could go on; or every node that could serve it broke it",
    503: "No node has room now; `retry-after` says when one should",
    504: "The request's deadline passed",
    507: "The disk does not take the change; nothing was changed",
}
GENERATING = (400, 401, 403, 404, 408, 413, 415, 429, 500, 502, 503, 504)
CHANGING = (400, 401, 408, 409, 413, 415, 429, 500)
USAGE_ERRORS = (400, 401, 429, 500, 503)


@dataclass(frozen=True, slots=True)
class Route:
    """One operation. answer: by content type, the type of a 200; None for text. errors: statuses with an error object.
    also: statuses with the same answer as 200."""

    method: str
    path: str
    tag: str
    summary: str
    body: type[BaseModel] | None = None
    answer: dict[str, type[BaseModel] | None] | None = None
    errors: Sequence[int] = (500,)
    also: Sequence[int] = ()
    security: str | None = None
    query: Sequence[str] = ()


ROUTES = (
    Route(
        "post",
        "/v1/chat/completions",
        "OpenAI",
        "Answers to a conversation",
        ChatCompletionRequest,
        {JSON: ChatCompletion, EVENTS: ChatCompletionChunk},
        GENERATING,
        security="api_key",
    ),
    Route(
        "post",
        "/v1/completions",
        "OpenAI",
        "What follows a prompt",
        CompletionRequest,
        {JSON: Completion, EVENTS: Completion},
        GENERATING,
        security="api_key",
    ),
    Route(
        "post",
        "/v1/embeddings",
        "OpenAI",
        "Vectors of texts",
        EmbeddingRequest,
        {JSON: EmbeddingList},
        GENERATING,
        security="api_key",
    ),
    Route(
        "get",
        "/v1/models",
        "OpenAI",
        "The models of the mesh",
        answer={JSON: ModelList},
        errors=(401, 429, 500, 503),
        security="api_key",
    ),
    Route(
        "get",
        "/v1/models/{name}",
        "OpenAI",
        "One model; its name may have slashes",
        answer={JSON: ModelObject},
        errors=(401, 404, 429, 500, 503),
        security="api_key",
    ),
    *(
        Route("get", path, "Health", summary, answer={JSON: Health}, also=(503,))
        for path, summary in (
            ("/health", "Whether this node is ready to serve"),
            ("/health/ready", "Whether this node is ready to serve"),
            ("/health/live", "Whether this node works, be it ready or not"),
        )
    ),
    Route("get", "/cluster/status", "Cluster", "Every node as this one sees it", answer={JSON: ClusterStatus}),
    Route(
        "get",
        "/cluster/events",
        "Cluster",
        "What happens in the mesh, the recent first, then live; with status=1 its status each second",
        answer={EVENTS: ClusterEvent},
        errors=(500, 503),
        query=("status",),
    ),
    Route("get", "/cluster/views", "Cluster", "What each node believes of each other", answer={JSON: ClusterViews}),
    Route("get", "/cluster/sd", "Cluster", "Every node, for http_sd_configs", answer={JSON: ScrapeTargets}),
    Route("get", "/metrics", "Cluster", "Figures for Prometheus", answer={"text/plain": None}),
    Route("get", "/metrics/cluster", "Cluster", "The figures of every node", answer={"text/plain": None}),
    Route("get", "/openapi.json", "Description", "This description", answer={JSON: None}),
    Route("get", "/", "People", "The status page, with a chat", answer={"text/html": None}),
    Route("get", "/web/{name}", "People", "A file of the status page", answer={"text/css": None}, errors=(404, 500)),
    Route("get", "/docs", "Description", "This description as a page", answer={"text/html": None}),
    *(
        Route(method, path, "Admin", summary, body, {LINES: None}, errors, security="admin_token", query=query)
        for method, path, summary, body, errors, query in (
            ("get", "/admin/keyring", "The cluster keys of every node", None, (401, 429, 500), ()),
            ("post", "/admin/keyring/install", "Install a cluster key", admin.InstallBody, CHANGING, ()),
            ("post", "/admin/keyring/use", "Seal with another key", admin.KeyBody, CHANGING, ()),
            ("post", "/admin/keyring/remove", "Remove a cluster key", admin.KeyBody, CHANGING, ()),
            ("get", "/admin/members", "Members, or what one believes", None, (401, 409, 429, 500), ("of",)),
            ("post", "/admin/join", "Join through a node", admin.JoinBody, CHANGING, ()),
            ("post", "/admin/drain", "Have a node finish and take nothing new", admin.DrainBody, CHANGING, ()),
            ("post", "/admin/leave", "Have a node leave", admin.LeaveBody, CHANGING, ()),
            ("post", "/admin/forget", "Forget a node that is gone", admin.ForgetBody, CHANGING, ()),
        )
    ),
    *(
        Route(method, path, "Keys", summary, body, {JSON: kind}, errors, security="admin_token", query=query)
        for method, path, summary, body, kind, errors, query in (
            ("get", "/admin/keys", "All API keys that are not revoked", None, KeyList, (401, 429, 500), ()),
            ("post", "/admin/keys", "Make an API key", keys.CreateBody, EditedKey, (*CHANGING, 507), ()),
            ("get", "/admin/keys/{name}", "One key, by id or name", None, KeyObject, (401, 404, 409, 429, 500), ()),
            ("patch", "/admin/keys/{name}", "Change a key", keys.ChangeBody, EditedKey, (*CHANGING, 404, 507), ()),
            (
                "delete",
                "/admin/keys/{name}",
                "Revoke a key, or with all=true every one of that name or family",
                None,
                EditedKey,
                (400, 401, 404, 409, 429, 500, 507),
                ("all",),
            ),
            (
                "post",
                "/admin/keys/{name}/rotate",
                "Make a new key for an old one",
                keys.RotateBody,
                EditedKey,
                (*CHANGING, 404, 507),
                (),
            ),
            (
                "get",
                "/admin/usage",
                "What keys used",
                None,
                UsageAnswer,
                (400, 401, 404, 409, 429, 500, 503),
                ("from", "to", "key"),
            ),
        )
    ),
)


def register(app: Quart, services: Services) -> None:
    # Made at the first request for it, and the same from then on.
    made: dict[str, str] = {}

    def text(name: str) -> str:
        if not made:
            document = openapi_document(services.version)
            made["json"] = json.dumps(document, ensure_ascii=False)
            made["page"] = docs_page(document)
        return made[name]

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return Response(text("json"), 200, content_type=JSON)

    @app.get("/docs")
    async def docs() -> Response:
        return Response(text("page"), 200, PAGE_HEADERS, content_type="text/html; charset=utf-8")


def openapi_document(version: str) -> dict[str, Any]:
    """OpenAPI 3.1. version: of the API's node."""
    answers = [kind for route in ROUTES for kind in (route.answer or {}).values() if kind is not None]
    bodies = [route.body for route in ROUTES if route.body is not None]
    kinds: list[type[BaseModel]] = list(dict.fromkeys([*bodies, *answers, ErrorAnswer]))
    _, schemas = models_json_schema([(kind, "validation") for kind in kinds], ref_template=REF)
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method] = _operation(route)
    return {
        "openapi": OPENAPI_VERSION,
        "info": {
            "title": "AI Cluster",
            "version": version,
            "description": "Language models served by a mesh of nodes, any of which answers. Fields that a body's "
            "type does not list are accepted and do nothing, unless OpenAI documents them: those are refused by name.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {
                "api_key": {"type": "http", "scheme": "bearer", "description": "An API key"},
                "admin_token": {"type": "http", "scheme": "bearer", "description": "The node's admin token"},
            },
        },
    }


def _operation(route: Route) -> dict[str, Any]:
    answer = {content_type: _answer(content_type, kind) for content_type, kind in (route.answer or {}).items()}
    responses: dict[str, Any] = {"200": {"description": "The answer", "content": answer}}
    for status in route.also:
        responses[str(status)] = {"description": "The answer is no", "content": answer}
    for status in route.errors:
        responses[str(status)] = {"description": ERRORS[status], "content": {JSON: {"schema": _ref(ErrorAnswer)}}}
        if status == 503:
            responses[str(status)]["headers"] = {"retry-after": {"schema": {"type": "integer"}}}
    path = route.path.strip("/") or "page"
    name = path.replace("{", "").replace("}", "").replace("/", "_").replace(".", "_")
    operation: dict[str, Any] = {
        "operationId": f"{route.method}_{name}",
        "tags": [route.tag],
        "summary": route.summary,
        "responses": responses,
    }
    if route.body is not None:
        # A body of nothing but defaults may be left out.
        is_required = any(field.is_required() for field in route.body.model_fields.values())
        operation["requestBody"] = {"required": is_required, "content": {JSON: {"schema": _ref(route.body)}}}
    parameters: list[dict[str, Any]] = [
        {"name": field, "in": "query", "schema": {"type": "string"}} for field in route.query
    ]
    if "{name}" in route.path:
        parameters.append({"name": "name", "in": "path", "required": True, "schema": {"type": "string"}})
    if parameters:
        operation["parameters"] = parameters
    if route.security is not None:
        # A mesh on loopback that has no key asks for none.
        operation["security"] = [{route.security: []}] + ([{}] if route.security == "api_key" else [])
    return operation


def _answer(content_type: str, kind: type[BaseModel] | None) -> dict[str, Any]:
    if content_type == EVENTS and kind is not None:
        return {"schema": _event(kind)}
    if kind is None:
        return {"schema": {"type": "object"} if content_type == JSON else {"type": "string"}}
    return {"schema": _ref(kind)}


def _event(kind: type[BaseModel]) -> dict[str, Any]:
    """OpenAPI 3.1 has no word for streams; as tools read it, the schema is that of each event."""
    if kind is ClusterEvent:
        return {
            "type": "object",
            "description": "Events named cluster, and status where it was asked for; their data is JSON",
            "properties": {"data": {"type": "string", "contentMediaType": JSON}},
            "required": ["data"],
        }
    payload = {"contentMediaType": JSON, "contentSchema": {"anyOf": [_ref(kind), _ref(ErrorAnswer)]}}
    return {
        "type": "object",
        "description": f"With stream=true: events, each with a {kind.__name__}, an error, or [DONE] at the end",
        "properties": {"data": {"type": "string", "anyOf": [{"const": "[DONE]"}, payload]}},
        "required": ["data"],
    }


def _ref(kind: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REF.format(model=kind.__name__)}
