import json

import pytest

from nodes.api.chat_schema import parse_chat
from nodes.generation import GenerateRequest, RequestInvalid

MESSAGE = {"role": "user", "content": "hi"}


def body(**fields: object) -> bytes:
    return json.dumps({"model": "demo", "messages": [MESSAGE], **fields}).encode()


def generate(**fields: object) -> GenerateRequest:
    return parse_chat(body(**fields)).plan("req_1", 600.0, "a").generations[0]


def test_fields_become_a_generate_request() -> None:
    request = generate(temperature=0, top_p=0.5, seed=7, max_tokens=9, stop=["x", "y"], user="someone")
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.max_tokens) == (0.0, 0.5, 7, 9)
    assert sampling.stop == ("x", "y")
    assert request.messages == ({"role": "user", "content": "hi"},)


def test_what_is_absent_or_null_is_left_to_the_model() -> None:
    for fields in ({}, {"temperature": None, "top_p": None, "seed": None, "max_tokens": None, "stop": None}):
        sampling = generate(**fields).sampling
        assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.stop) == (None, None, None, ())


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert generate(messages=[{"role": "user", "content": parts}]).messages[0]["content"] == "ab"


def test_unknown_extra_fields_are_accepted() -> None:
    assert generate(something_new=1).model == "demo"


def test_fields_that_ask_for_nothing_are_accepted() -> None:
    assert generate(n=1, tools=[], logprobs=False, response_format={"type": "text"}, presence_penalty=0.0).model


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2**64}, "max_tokens"),
        ({"messages": [1] * 5000}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [1] * 900_000}]}, "messages[0].content"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"model": ""}, "model"),
        ({"model": 5}, "model"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 2**80}, "seed"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_honoured_is_refused_by_name(fields: dict[str, object], param: str) -> None:
    with pytest.raises(RequestInvalid) as raised:
        generate(**fields)
    assert raised.value.param == param
    assert raised.value.status == 400


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[]", b"null", b'"x"', b'{"model": "\\ud800"}', b"[" * 5000])
def test_a_body_that_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(RequestInvalid):
        parse_chat(data)
