"""The API's description: it has every route, and every answer is what it says."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from nodes.api.answer_schema import (
    ChatCompletion,
    ChatCompletionChunk,
    ClusterStatus,
    ClusterViews,
    Completion,
    ErrorAnswer,
    Health,
    ModelList,
    ModelObject,
)
from nodes.api.chat_schema import NOT_SERVED as CHAT_NOT_SERVED
from nodes.api.chat_schema import ChatCompletionRequest
from nodes.api.completion_schema import NOT_SERVED as COMPLETION_NOT_SERVED
from nodes.api.completion_schema import CompletionRequest
from nodes.api.embedding_schema import EmbeddingRequest
from nodes.api.openapi import ERRORS, ROUTES, openapi_document
from nodes.generation import GenerateEvent, TokenLogprob, Usage
from nodes.node import GENERATING_PATHS
from tests.unit.scripted_api import ANSWER, Api, ScriptedDispatch, events

DOCUMENT = openapi_document("0.1")
TOOL = {"type": "function", "function": {"name": "weather"}}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Ulm"}}</tool_call>'
ROWS = (TokenLogprob("Hi", -0.1, (("Hi", -0.1), ("Yo", -2.5))), TokenLogprob("\N{REPLACEMENT CHARACTER}", -0.2))


def references(value: object) -> set[str]:
    if isinstance(value, dict):
        found = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return found.union(*map(references, value.values()))
    return set().union(*map(references, value)) if isinstance(value, list) else set()


def test_every_route_is_described_and_no_other() -> None:
    app: Any = Api(ScriptedDispatch()).app
    served = {
        (method.lower(), re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule))
        for rule in app._app._app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
    }
    described = {(method, path) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert served == described


def test_every_status_of_an_error_is_on_the_page_of_the_api() -> None:
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    table = text[text.index("## Errors") :].split("\n## ")[0]
    told = {int(status) for cell in re.findall(r"^\| ([0-9, ]+) \|", table, re.M) for status in cell.split(", ")}
    paths = [routes.values() for path, routes in DOCUMENT["paths"].items() if path.startswith("/v1/")]
    answered = {int(status) for routes in paths for route in routes for status in route["responses"]}
    assert told == {status for status in answered if status >= 400} | {405, 431, 501}


def test_every_route_that_computes_is_counted_from_its_beginning() -> None:
    posted = {path for path, methods in DOCUMENT["paths"].items() if path.startswith("/v1/") and "post" in methods}
    assert set(GENERATING_PATHS) == posted


def test_every_route_that_takes_no_key_is_named_where_it_is_warned_of() -> None:
    text = (Path(__file__).parents[2] / "SECURITY.md").read_text()
    named = set(re.findall(r"`(/[^`]*)`", text[text.index("Open without a key:") :].split("\n\n")[0]))
    paths = {path.replace("{name}", "*") for path in DOCUMENT["paths"] if not path.startswith(("/v1/", "/admin/"))}
    assert named == paths


def test_every_reference_leads_somewhere() -> None:
    found = references(DOCUMENT)
    assert found
    for reference in found:
        assert reference.removeprefix("#/components/schemas/") in DOCUMENT["components"]["schemas"]


def test_operation_ids_are_unique_and_every_error_is_openais_object() -> None:
    operations = [operation for methods in DOCUMENT["paths"].values() for operation in methods.values()]
    ids = [operation["operationId"] for operation in operations]
    assert len(set(ids)) == len(ids) == len(ROUTES)
    for operation in operations:
        for status, response in operation["responses"].items():
            if int(status) in ERRORS and not (status == "503" and "Health" in operation["tags"]):
                assert response["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorAnswer")


def test_a_body_of_defaults_alone_may_be_left_out_and_no_other() -> None:
    required = {
        path: operation["requestBody"]["required"]
        for path, methods in DOCUMENT["paths"].items()
        for operation in methods.values()
        if "requestBody" in operation
    }
    assert not required["/admin/leave"]
    assert required["/admin/forget"]
    assert required["/v1/chat/completions"]


def test_every_route_that_asks_for_a_key_says_that_the_gate_may_tell_to_wait() -> None:
    for route in ROUTES:
        assert route.security != "api_key" or {401, 429, 503} <= set(route.errors)


def test_a_time_may_be_written_as_a_date() -> None:
    kinds = DOCUMENT["components"]["schemas"]["CreateBody"]["properties"]["expires_at"]["anyOf"]
    assert {kind["type"] for kind in kinds} == {"integer", "string", "null"}


def test_what_is_refused_is_not_in_the_request_types_and_what_is_honoured_is() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    chat = schemas["ChatCompletionRequest"]["properties"]
    assert {"messages", "n", "tools", "response_format", "logit_bias", "guided_json"} <= set(chat)
    assert not {"audio", "prediction", "functions", "reasoning_effort"} & set(chat)
    assert schemas["JsonSchema"]["properties"]["schema"]
    assert set(schemas["ChatCompletionRequest"]["required"]) == {"model", "messages"}


@pytest.mark.parametrize(
    ("script", "fields"),
    [
        (ANSWER, {}),
        (ANSWER, {"n": 2, "service_tier": "auto"}),
        ([GenerateEvent("Hi", (1, 2), "length", Usage(1, 2), ROWS)], {"logprobs": True, "top_logprobs": 2}),
        ([GenerateEvent(CALL, (1,), "stop", Usage(1, 2))], {"tools": [TOOL]}),
        (
            [GenerateEvent('[{"name": "weather", "arguments": {}}]', (1,), "stop", Usage(1, 2))],
            {"tools": [TOOL], "tool_choice": "required"},
        ),
    ],
    ids=["plain", "two", "logprobs", "a call", "a forced call"],
)
async def test_chat_answers_are_of_their_types(script: list[Any], fields: dict[str, Any]) -> None:
    api = Api(ScriptedDispatch(*script))
    ChatCompletion.model_validate((await api.chat(**fields)).json())
    *chunks, done = events(await api.chat(**fields, stream=True, stream_options={"include_usage": True}))
    assert done == "[DONE]"
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)


@pytest.mark.parametrize("fields", [{}, {"logprobs": 2}, {"echo": True, "n": 2}])
async def test_completions_are_of_their_type(fields: dict[str, Any]) -> None:
    api = Api(ScriptedDispatch(GenerateEvent("Hi", (1, 2), "stop", Usage(1, 2), ROWS)))
    Completion.model_validate((await api.complete(**fields)).json())
    *chunks, _ = events(await api.complete(**fields, stream=True))
    for chunk in chunks:
        Completion.model_validate(chunk)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/models", ModelList),
        ("/v1/models/demo", ModelObject),
        ("/v1/models/absent", ErrorAnswer),
        ("/nowhere", ErrorAnswer),
        ("/admin/members", ErrorAnswer),
        ("/health", Health),
        ("/health/live", Health),
        ("/cluster/status", ClusterStatus),
        ("/cluster/views", ClusterViews),
    ],
)
async def test_other_answers_are_of_their_types(path: str, kind: type[BaseModel]) -> None:
    kind.model_validate_json((await Api(ScriptedDispatch()).client.get(path)).text)


async def test_the_document_is_served() -> None:
    response = await Api(ScriptedDispatch()).client.get("/openapi.json")
    assert response.json() == DOCUMENT
    assert response.json()["openapi"].startswith("3.1")


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: set[str] = set()
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links |= {str(value) for name, value in attrs if name in ("href", "src")}
        self.ids |= {str(value) for name, value in attrs if name == "id"}


async def test_the_page_shows_every_path_and_loads_nothing() -> None:
    response = await Api(ScriptedDispatch()).client.get("/docs")
    page = _Page()
    page.feed(response.text)
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert not page.tags & {"script", "link", "img", "iframe"}
    assert page.links - {"openapi.json"} == {link for link in page.links if link[1:] in page.ids}
    for path in DOCUMENT["paths"]:
        assert path in response.text
    assert "ChatCompletionChunk</a>" in response.text.split("text/event-stream")[0]


def test_every_field_is_on_its_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", page))
    fields = {*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields, *EmbeddingRequest.model_fields}
    assert not (fields | CHAT_NOT_SERVED.keys() | COMPLETION_NOT_SERVED.keys()) - named
