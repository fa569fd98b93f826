"""Requests and events between nodes: what one encodes the other decodes, and what an older one must not take."""

from __future__ import annotations

import json
from dataclasses import replace

import msgpack
import pytest

from nodes.engine.prefix_digest import cached_bytes
from nodes.generation import GenerateEvent, GenerateRequest, GenerationFailed, Grammar, RequestInvalid, Sampling, Usage
from nodes.generation_codec import REQUEST_VERSION, decode_event, decode_request, encode_event, encode_request
from observability.trace_context import TraceContext

TRACE = TraceContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", 1)
PLAIN = GenerateRequest("id", "demo", ({"role": "user", "content": "hi"},), Sampling(logprobs=0, choice=3))
TOOLS = json.dumps([{"type": "function", "function": {"name": "f"}}])
CALLS: dict[str, str] = {"role": "assistant", "content": "", "tool_calls": "[]"}


@pytest.mark.parametrize(
    ("request_", "version"),
    [
        (PLAIN, 1),
        (replace(PLAIN, sampling=Sampling(grammar=Grammar("regex", "a"), stop=("x",), logit_bias=((1, 2.0),))), 1),
        (replace(PLAIN, messages=({"role": "tool", "content": "x", "tool_call_id": "y"},)), 1),
        (replace(PLAIN, messages=(CALLS,)), 2),
        (replace(PLAIN, tools=TOOLS), 2),
        (replace(PLAIN, messages=(), prompt="once"), 2),
        (replace(PLAIN, messages=(), prompt=""), 2),
        (replace(PLAIN, messages=(), prompt=(1, 2, 300_000)), 2),
    ],
    ids=["plain", "grammar", "tool result", "calls", "tools", "prompt", "empty prompt", "ids"],
)
def test_a_request_arrives_as_it_was_under_the_lowest_version_that_knows_it(
    request_: GenerateRequest, version: int
) -> None:
    data = encode_request(request_)
    assert decode_request(data) == request_
    assert msgpack.unpackb(data)["version"] == version


def test_a_request_of_a_later_version_is_left_to_another_node() -> None:
    body = msgpack.unpackb(encode_request(PLAIN)) | {"version": REQUEST_VERSION + 1}
    with pytest.raises(GenerationFailed, match="older"):
        decode_request(msgpack.packb(body))


@pytest.mark.parametrize("prompt", [["a"], [None], [[1]]])
def test_a_prompt_of_anything_else_is_refused(prompt: object) -> None:
    body = msgpack.unpackb(encode_request(PLAIN)) | {"prompt": prompt}
    with pytest.raises(RequestInvalid):
        decode_request(msgpack.packb(body))


def test_tools_and_prompts_have_a_size_and_names_for_routing() -> None:
    assert replace(PLAIN, tools=TOOLS).text_bytes() == PLAIN.text_bytes() + len(TOOLS)
    assert replace(PLAIN, messages=({"role": "assistant", "content": "ü", "tool_calls": "[]"},)).text_bytes() == 4
    assert GenerateRequest("id", "demo", (), prompt="x" * 100).text_bytes() == 100
    assert GenerateRequest("id", "demo", (), prompt=(1,) * 100).text_bytes() == 400
    for shorter, longer in (("ab" * 500, "ab" * 600), ((7,) * 500, (7,) * 600)):
        one, other = (GenerateRequest("id", "demo", (), prompt=prompt).text_blocks() for prompt in (shorter, longer))
        assert cached_bytes(other, set(one)) >= 768
    with_tools = replace(PLAIN, tools="x" * 1000)
    assert set(with_tools.text_blocks()).isdisjoint(replace(PLAIN, tools="y" * 1000).text_blocks())


def test_the_trace_arrives_and_needs_no_later_version() -> None:
    for trace in (TRACE, replace(TRACE, flags=0), replace(TRACE, state="vendor=abc,other=1")):
        data = encode_request(replace(PLAIN, trace=trace))
        assert decode_request(data).trace == trace
        assert msgpack.unpackb(data)["version"] == msgpack.unpackb(encode_request(PLAIN))["version"]
    assert "traceparent" not in msgpack.unpackb(encode_request(PLAIN)), "it costs no bytes where there is none"


@pytest.mark.parametrize(
    "fields", [{"traceparent": "x"}, {"traceparent": 7}, {"tracestate": "a=1"}, {"traceparent": []}]
)
def test_a_trace_that_cannot_be_read_fails_no_request(fields: dict[str, object]) -> None:
    body = msgpack.unpackb(encode_request(PLAIN)) | fields
    assert decode_request(msgpack.packb(body)) == PLAIN


@pytest.mark.parametrize("queued_s", [None, 0.0, 1.25])
def test_the_wait_for_a_slot_arrives_with_the_last_event(queued_s: float | None) -> None:
    event = GenerateEvent("a", (1,), "stop", Usage(5, 3, 2, queued_s))
    decoded = decode_event(msgpack.unpackb(msgpack.packb(encode_event(event))))
    assert decoded == event
    assert decoded.usage is not None
    assert decoded.usage.queued_s == queued_s


def test_the_last_event_of_a_node_that_tells_no_wait_is_read() -> None:
    decoded = decode_event(["a", [1], "stop", [5, 3, 2]])
    assert decoded.usage == Usage(5, 3, 2)
    assert decoded.usage.queued_s is None


@pytest.mark.parametrize("counts", [[5, 3], {"a": 1}, 7, [5, 3, 2, "soon"], [5, 3, 2, float("nan")]])
def test_usage_of_another_form_is_no_event(counts: object) -> None:
    with pytest.raises(ValueError, match=r"undecodable|could not convert"):
        decode_event(["a", [1], "stop", counts])
