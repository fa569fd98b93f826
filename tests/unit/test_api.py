"""The HTTP application over a scripted Dispatch: statuses, shapes, and what is counted, without a node."""

from __future__ import annotations

import gzip
import json

import pytest
import trio

from mesh.errors import ModelUnknown, NoCapacity
from mesh.view import Readiness
from nodes.api import answering
from nodes.generation import DeadlineExceeded, GenerationFailed, RequestInvalid
from tests.unit.scripted_api import ANSWER, BODY, Api, ScriptedDispatch, events, view


async def test_a_plain_answer_is_openais_object() -> None:
    api = Api(ScriptedDispatch(*ANSWER))
    response = await api.chat()
    answer = response.json()
    assert response.status_code == 200
    assert response.headers["x-ai-cluster-node"] == "b"
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello!", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert answer["usage"]["total_tokens"] == 8
    assert api.metrics.keys == [("anonymous", "success")]
    assert api.metrics.http == [("POST", "/v1/chat/completions", 200)]
    assert api.metrics.streams == []
    assert api.dispatch.stream.is_closed


async def test_a_stream_is_openais_chunks() -> None:
    api = Api(ScriptedDispatch(*ANSWER))
    response = await api.chat(stream=True)
    *chunks, done = events(response)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        {"content": "!"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, None, "stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert "usage" not in chunks[0]
    assert api.metrics.streams == [("demo", "success")]
    assert api.dispatch.stream.is_closed


async def test_the_usage_chunk_comes_last_and_only_when_asked_for() -> None:
    response = await Api(ScriptedDispatch(*ANSWER)).chat(stream=True, stream_options={"include_usage": True})
    *chunks, usage, done = events(response)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 3
    assert {chunk["usage"] for chunk in chunks} == {None}


async def test_a_failure_in_mid_stream_is_an_error_frame_and_no_done() -> None:
    api = Api(ScriptedDispatch(ANSWER[0], GenerationFailed("node b failed")))
    *_, last = events(await api.chat(stream=True))
    assert last["error"]["message"] == "node b failed"
    assert api.metrics.streams == [("demo", "error")]
    assert api.metrics.keys == [("anonymous", "error")]


async def test_a_plain_answer_that_breaks_is_an_error() -> None:
    api = Api(ScriptedDispatch(ANSWER[0], GenerationFailed("node b failed")))
    response = await api.chat()
    assert response.status_code == 502
    assert api.metrics.keys == [("anonymous", "error")]
    assert api.dispatch.stream.is_closed


async def test_a_late_first_event_sends_headers_and_keep_alives(autojump_clock: trio.testing.MockClock) -> None:
    pause = answering.FIRST_EVENT_S + 2 * answering.KEEP_ALIVE_S + 1.0
    response = await Api(ScriptedDispatch(pause, *ANSWER)).chat(stream=True)
    found = events(response)
    assert found.count(": keep-alive") == 2
    assert found[-1] == "[DONE]"


@pytest.mark.parametrize(
    ("refusal", "status", "code", "counted"),
    [
        (ModelUnknown("no model named x"), 404, "model_not_found", "rejected"),
        (NoCapacity("all queues are full", 7.2), 503, "no_capacity", "rejected"),
        (RequestInvalid("too long", param="messages", code="context_length_exceeded"), 400, None, "rejected"),
        (DeadlineExceeded("over"), 504, "deadline_exceeded", "error"),
        (GenerationFailed("broke"), 502, "generation_failed", "error"),
        (RuntimeError("secret detail"), 500, "internal_error", "error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_a_refusal_has_its_status_and_openais_shape(
    refusal: Exception, status: int, code: str | None, counted: str, stream: bool
) -> None:
    api = Api(ScriptedDispatch(refusal=refusal))
    response = await api.chat(stream=stream)
    error = response.json()["error"]
    assert response.status_code == status
    assert set(error) == {"message", "type", "param", "code"}
    assert code is None or error["code"] == code
    assert "secret" not in response.text
    assert response.headers.get("retry-after") == ("8" if status == 503 else None)
    assert api.metrics.keys == [("anonymous", counted)]
    assert api.metrics.streams == ([("demo", counted)] if stream else [])


async def test_off_loopback_nobody_is_served_until_the_node_is_opened() -> None:
    api = Api(ScriptedDispatch(*ANSWER), is_open=False)
    assert (await api.chat()).status_code == 401
    assert (await api.client.get("/v1/models")).status_code == 401
    assert (await api.client.get("/health")).status_code == 200
    assert api.metrics.keys == [("invalid", "rejected")]


@pytest.mark.parametrize(
    ("readiness", "ready", "live"),
    [
        (Readiness.LOADING, 503, 200),
        (Readiness.READY, 200, 200),
        (Readiness.DRAINING, 503, 200),
        (Readiness.FAILED, 503, 503),
    ],
)
async def test_health_tells_ready_from_alive(readiness: Readiness, ready: int, live: int) -> None:
    client = Api(ScriptedDispatch(), view(readiness)).client
    assert (await client.get("/health")).status_code == ready
    assert (await client.get("/health/ready")).status_code == ready
    assert (await client.get("/health/live")).status_code == live


async def test_two_fingerprints_under_one_name_are_a_warning() -> None:
    report = (await Api(ScriptedDispatch(), view(a="f1", b="f2")).client.get("/cluster/status")).json()
    assert len(report["warnings"]) == 1
    assert "demo" in report["warnings"][0]
    assert (await Api(ScriptedDispatch(), view(a="f1", b="f1")).client.get("/cluster/status")).json()["warnings"] == []


async def test_paths_that_exist_nowhere_are_one_series() -> None:
    api = Api(ScriptedDispatch())
    for path in ("/wp-login.php", "/.env", "/v2/x"):
        assert (await api.client.get(path)).status_code == 404
    assert {path for _, path, _ in api.metrics.http} == {"unmatched"}


async def test_a_405_says_what_is_allowed() -> None:
    response = await Api(ScriptedDispatch()).client.put("/v1/chat/completions")
    assert response.status_code == 405
    assert "POST" in response.headers["allow"]
    assert response.json()["error"]["message"] == "this path is for POST"


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
async def test_a_body_that_a_web_page_could_send_unasked_is_refused(content_type: str | None) -> None:
    dispatch = ScriptedDispatch(*ANSWER)
    headers = {} if content_type is None else {"content-type": content_type}
    response = await Api(dispatch).client.post("/v1/chat/completions", content=json.dumps(BODY), headers=headers)
    assert response.status_code == 415
    assert dispatch.requests == []


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
async def test_a_compressed_body_is_refused_as_one(path: str) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    client = Api(ScriptedDispatch(*ANSWER)).client
    response = await client.post(path, content=gzip.compress(b"{}"), headers=headers)
    assert response.status_code == 415
    message = "the body's content encoding is gzip; send it as it is, without content-encoding"
    assert response.json()["error"]["message"] == message
    plain = await client.post(path, content=b"{}", headers=headers | {"content-encoding": "identity"})
    assert plain.status_code == 400


async def test_a_body_over_the_limit_is_413() -> None:
    headers = {"content-type": "application/json"}
    response = await Api(ScriptedDispatch()).client.post("/v1/chat/completions", content=b" " * 10_001, headers=headers)
    assert response.status_code == 413
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_every_response_carries_a_request_id() -> None:
    client = Api(ScriptedDispatch()).client
    own = await client.get("/health", headers={"x-request-id": "mine-1"})
    assert own.headers["x-request-id"] == "mine-1"
    unsafe = await client.get("/nowhere", headers={"x-request-id": "a b\t;"})
    assert unsafe.headers["x-request-id"].startswith("req_")
