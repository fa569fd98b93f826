"""POST /v1/embeddings: inputs in each form, both encodings, what is refused, and what a key is charged."""

from __future__ import annotations

import base64
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from mesh.counters_wire import Totals
from mesh.errors import NoCapacity
from mesh.view import EMBEDDING, ClusterView, ModelInfo, NodeProfile
from nodes.api.answer_schema import EmbeddingList, ErrorAnswer
from nodes.api.embedding_schema import DIMENSIONS_MAX, INPUT_IDS_TOTAL_MAX, INPUTS_MAX
from nodes.api.embeddings import WRITE_INLINE_NUMBERS_MAX
from nodes.api.schema import TOKENS_MAX
from nodes.api.texts_or_ids import FORMS
from nodes.generation import GenerationFailed, RequestInvalid
from tests.unit.scripted_api import ANSWER, Api, ScriptedDispatch, ScriptedEmbeddings, view


def language_model(name: str) -> ModelInfo:
    return ModelInfo(name, "f", 1024, 8)


def api_of(embeddings: ScriptedEmbeddings | None = None, cluster: ClusterView | None = None, **options: Any) -> Api:
    return Api(ScriptedDispatch(*ANSWER), cluster or view(kind=EMBEDDING), embeddings=embeddings, **options)


async def test_an_answer_is_openais_object() -> None:
    api = api_of()
    response = await api.embed(input=["a", "b"])
    assert response.status_code == 200
    assert response.json() == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [1.0, 0.5, -0.25, 0.0]},
            {"object": "embedding", "index": 1, "embedding": [2.0, 0.5, -0.25, 0.0]},
        ],
        "model": "demo",
        "usage": {"prompt_tokens": 6, "total_tokens": 6},
    }
    EmbeddingList.model_validate(response.json())
    assert response.headers["x-ai-cluster-node"] == "b"
    assert response.headers["x-request-id"] == api.embeddings.requests[0].request_id
    assert api.metrics.keys == [("anonymous", "success")]
    assert api.metrics.http == [("POST", "/v1/embeddings", 200)]
    assert api.metrics.streams == []


async def test_base64_is_of_little_endian_float32() -> None:
    response = await api_of().embed(input=["a", "b"], encoding_format="base64")
    EmbeddingList.model_validate(response.json())
    vectors = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4").tolist() for row in response.json()["data"]]
    assert vectors == [[1.0, 0.5, -0.25, 0.0], [2.0, 0.5, -0.25, 0.0]]


@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_a_large_answer_is_the_same_as_a_small_one(encoding: str) -> None:
    dimensions = WRITE_INLINE_NUMBERS_MAX
    large = await api_of(ScriptedEmbeddings(dimensions)).embed(input=["a", "b"], encoding_format=encoding)
    small = await api_of(ScriptedEmbeddings(dimensions)).embed(input=["a"], encoding_format=encoding)
    assert large.json()["data"][0] == small.json()["data"][0]
    assert len(large.json()["data"]) == 2


@pytest.mark.parametrize(
    ("value", "inputs"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2, 3], ((1, 2, 3),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
        (["x"] * INPUTS_MAX, ("x",) * INPUTS_MAX),
    ],
    ids=["text", "texts", "ids", "lists of ids", "as many as OpenAI takes"],
)
async def test_inputs_are_texts_or_ids_one_or_several(value: object, inputs: tuple[object, ...]) -> None:
    api = api_of()
    response = await api.embed(input=value, dimensions=3, user="someone", unknown_field=1)
    assert response.status_code == 200
    assert [row["index"] for row in response.json()["data"]] == list(range(len(inputs)))
    (request,) = api.embeddings.requests
    assert (request.inputs, request.dimensions, request.model) == (inputs, 3, "demo")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": [2**31]}, "input"),
        ({"input": 7}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": ["x"] * (INPUTS_MAX + 1)}, "input"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": DIMENSIONS_MAX + 1}, "dimensions"),
        ({"dimensions": "3"}, "dimensions"),
        ({"user": 3}, "user"),
        ({"model": ""}, "model"),
    ],
)
async def test_what_is_no_request_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    api = api_of()
    response = await api.embed(**fields)
    assert response.status_code == 400
    ErrorAnswer.model_validate(response.json())
    assert response.json()["error"]["param"].startswith(param)
    assert api.embeddings.requests == []


@pytest.mark.parametrize(
    ("value", "param", "message"),
    [
        (["x"] * (INPUTS_MAX + 1), "input", f"has {INPUTS_MAX + 1} inputs, and may have at most {INPUTS_MAX} inputs"),
        ([[1]] * (INPUTS_MAX + 1), "input", f"has {INPUTS_MAX + 1} inputs, and may have at most {INPUTS_MAX} inputs"),
        ([], "input", "is an empty list; give at least one text"),
        ({}, "input", f"is an object, and should be {FORMS}"),
        (None, "input", f"is null, and should be {FORMS}"),
        (7, "input", f"is a number, and should be {FORMS}"),
        ([True], "input[0]", "is true, and should be a text, a token id or a list of token ids"),
        ([1, -2], "input[1]", f"is no token id: they are 0 to {TOKENS_MAX}"),
        ([1, True], "input[1]", "is true, and should be a token id, a whole number"),
        ([1, 2.5], "input[1]", "is a number with a fraction, and should be a token id, a whole number"),
        (["a", 1], "input[1]", "is a number, and should be a text as input[0] is"),
        ([[1], "a"], "input[1]", "is a text, and should be a list of token ids as input[0] is"),
        ([[1], []], "input[1]", "is empty; give at least one token id"),
        ([[1], [2, TOKENS_MAX + 1]], "input[1][1]", f"is no token id: they are 0 to {TOKENS_MAX}"),
        ([1] * (INPUT_IDS_TOTAL_MAX + 1), "input", f"has {INPUT_IDS_TOTAL_MAX + 1} token ids, the limit is"),
    ],
)
async def test_what_is_no_input_is_told_why(value: object, param: str, message: str) -> None:
    api = api_of()
    api.app._app._app.config["MAX_CONTENT_LENGTH"] = 10**7  # type: ignore[attr-defined]
    error = (await api.embed(input=value)).json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param} {message}")


async def test_token_ids_are_bounded_in_all() -> None:
    api = api_of()
    api.app._app._app.config["MAX_CONTENT_LENGTH"] = 10**7  # type: ignore[attr-defined]
    response = await api.embed(input=[[1] * 2000] * (INPUT_IDS_TOTAL_MAX // 2000 + 1))
    assert response.status_code == 400
    assert str(INPUT_IDS_TOTAL_MAX) in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["chat", "complete"])
async def test_an_embedding_model_does_not_generate_and_says_what_it_does(path: str) -> None:
    api = api_of()
    response = await getattr(api, path)()
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "model"
    assert "POST /v1/embeddings; no node has a model for generation" in error["message"]
    assert api.dispatch.requests == []


async def test_a_language_model_gives_no_embeddings_and_says_what_it_does() -> None:
    api = api_of(cluster=view())
    response = await api.embed()
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "model"
    assert "POST /v1/chat/completions" in response.json()["error"]["message"]
    assert api.embeddings.requests == []


async def test_a_model_of_another_kind_is_told_with_those_that_the_caller_may_use_instead() -> None:
    able = replace(view(b="f").members["b"], profile=NodeProfile(models=tuple(map(language_model, "gfedcb"))))
    embedder = view(kind=EMBEDDING).members["a"]
    api = api_of(cluster=ClusterView("a", 0.0, MappingProxyType({"a": embedder, "b": able})))
    message = (await api.chat()).json()["error"]["message"]
    assert message.endswith("models for generation are 'b', 'c', 'd', 'e', …")
    token = api.access.create(models=("demo", "c"))
    api.client.headers["authorization"] = f"Bearer {token}"
    assert (await api.chat()).json()["error"]["message"].endswith("models for generation are 'c'")


@pytest.mark.parametrize(
    ("error", "status", "code", "outcome"),
    [
        (NoCapacity("full", 2.0), 503, "no_capacity", "rejected"),
        (GenerationFailed("broken"), 502, "generation_failed", "error"),
        (RequestInvalid("too long", param="input", code="context_length_exceeded"), 400, "context_length_exceeded", ""),
    ],
)
async def test_failures_have_their_status(error: Exception, status: int, code: str, outcome: str) -> None:
    api = api_of(ScriptedEmbeddings(refusal=error))
    response = await api.embed()
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert api.metrics.keys[0][1] == (outcome or api.metrics.keys[0][1])


async def test_an_unknown_model_is_404_and_another_content_type_415() -> None:
    api = api_of()
    assert (await api.embed(model="absent")).status_code == 404
    assert (await api.client.post("/v1/embeddings", content=b"{}")).status_code == 415


async def test_a_key_is_charged_the_tokens_of_the_inputs_and_its_models_and_limits_hold() -> None:
    api = api_of()
    token = api.access.create("alice", requests_per_minute=2, models=("demo",))
    api.client.headers["authorization"] = f"Bearer {token}"
    response = await api.embed(input=["a", "b"])
    assert response.status_code == 200
    assert response.headers["x-ratelimit-remaining-requests"] == "1"
    (request,) = api.embeddings.requests
    assert request.fairness_id
    assert list((await api.access.used()).values()) == [Totals(1, 6, 0)]
    assert (await api.embed()).status_code == 200
    assert (await api.embed()).status_code == 429
    assert (await api.embed(model="other")).status_code == 403
    api.client.headers["authorization"] = "Bearer wrong"
    assert (await api.embed()).status_code == 401


async def test_a_request_that_failed_is_charged_nothing_but_itself() -> None:
    api = api_of(ScriptedEmbeddings(refusal=GenerationFailed("broken")))
    api.client.headers["authorization"] = f"Bearer {api.access.create('alice')}"
    await api.embed()
    assert list((await api.access.used()).values()) == [Totals(1, 0, 0)]
