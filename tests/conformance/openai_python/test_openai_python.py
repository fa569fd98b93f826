"""The official Python client."""

from __future__ import annotations

import json
import threading
from typing import Any, Literal

import openai
import pydantic
import pytest

MESSAGES: Any = [{"role": "user", "content": "How do I add a node?"}]
LONG: Any = {"temperature": 0, "max_tokens": 900, "extra_body": {"ignore_eos": True}}
SCHEMA: Any = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Ulm", "Bonn"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}}
TIME: Any = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}
NAMED: Any = {"type": "function", "function": {"name": "weather"}}


class Forecast(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    city: Literal["Ulm", "Bonn"]
    days: int = pydantic.Field(ge=0, le=9)  # unbounded, this model would write digits until its context is full


@pytest.fixture(scope="module")
def client(mesh: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=mesh.url, api_key=mesh.key, max_retries=0, timeout=60)


@pytest.fixture(params=[0, 1, 2], ids=["forwarded", "node-2", "node-3"])
def each_client(mesh: Any, request: pytest.FixtureRequest) -> openai.OpenAI:
    return openai.OpenAI(base_url=mesh.urls[request.param], api_key=mesh.key, max_retries=0, timeout=60)


def test_chat(each_client: openai.OpenAI) -> None:
    answer = each_client.chat.completions.create(model="demo", messages=MESSAGES, temperature=0, max_tokens=24)
    (choice,) = answer.choices
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert 0 < answer.usage.completion_tokens <= 24
    assert answer.system_fingerprint.startswith("fp_")
    assert answer._request_id


@pytest.mark.parametrize("with_usage", [True, False])
def test_streaming(each_client: openai.OpenAI, with_usage: bool) -> None:
    whole = each_client.chat.completions.create(model="demo", messages=MESSAGES, temperature=0, max_tokens=24)
    options: Any = {"stream_options": {"include_usage": True}} if with_usage else {}
    chunks = list(
        each_client.chat.completions.create(
            model="demo", messages=MESSAGES, temperature=0, max_tokens=24, stream=True, **options
        )
    )
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    told = [chunk for chunk in chunks if chunk.choices]
    assert told[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in told) == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in told]
    assert reasons == [None] * (len(told) - 1) + [whole.choices[0].finish_reason]
    if with_usage:
        assert chunks[-1].choices == []
        assert chunks[-1].usage.model_dump(exclude={"prompt_tokens_details"}) == whole.usage.model_dump(
            exclude={"prompt_tokens_details"}
        )
        assert all(chunk.usage is None for chunk in chunks[:-1])
    else:
        assert len(told) == len(chunks)
        assert all(chunk.usage is None for chunk in chunks)


def test_stream_helper_events(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="demo", messages=MESSAGES, temperature=0, seed=1) as stream:
        kinds = [event.type for event in stream]
        completion = stream.get_final_completion()
    assert "content.delta" in kinds
    assert kinds[-1] in ("content.done", "chunk")
    assert completion.choices[0].message.content


async def _async_answer(url: str, key: str) -> str:
    async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=60) as client:
        text = ""
        stream = await client.chat.completions.create(
            model="demo", messages=MESSAGES, temperature=0, max_tokens=24, stream=True
        )
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
        return text


def test_async_client(mesh: Any, client: openai.OpenAI) -> None:
    import asyncio

    whole = client.chat.completions.create(model="demo", messages=MESSAGES, temperature=0, max_tokens=24)
    assert asyncio.run(_async_answer(mesh.url, mesh.key)) == whole.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_n_and_seed(client: openai.OpenAI, stream: bool) -> None:
    wanted: Any = {"model": "demo", "messages": MESSAGES, "n": 3, "seed": 11, "temperature": 2, "max_tokens": 20}
    texts = []
    for _ in range(2):
        if stream:
            found = ["", "", ""]
            for chunk in client.chat.completions.create(stream=True, **wanted):
                for choice in chunk.choices:
                    found[choice.index] += choice.delta.content or ""
        else:
            answer = client.chat.completions.create(**wanted)
            assert [choice.index for choice in answer.choices] == [0, 1, 2]
            found = [choice.message.content or "" for choice in answer.choices]
        texts.append(found)
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: openai.OpenAI, stream: bool) -> None:
    wanted: Any = {"model": "demo", "messages": MESSAGES, "temperature": 0, "max_tokens": 8}
    wanted |= {"logprobs": True, "top_logprobs": 3}
    if stream:
        chunks = client.chat.completions.create(stream=True, **wanted)
        choices = [choice for chunk in chunks for choice in chunk.choices]
        rows = [row for choice in choices if choice.logprobs for row in choice.logprobs.content or []]
    else:
        rows = client.chat.completions.create(**wanted).choices[0].logprobs.content
    assert len(rows) == 8
    for row in rows:
        assert row.logprob <= 0
        assert len(row.top_logprobs) == 3
        assert row.token == row.top_logprobs[0].token
        assert row.bytes is None or bytes(row.bytes).decode() == row.token


def test_stop(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=MESSAGES, temperature=0, max_tokens=24)
    text = whole.choices[0].message.content
    word = text.split()[3]
    cut = client.chat.completions.create(model="demo", messages=MESSAGES, temperature=0, max_tokens=24, stop=[word])
    assert cut.choices[0].message.content == text[: text.index(word)]
    assert cut.choices[0].finish_reason == "stop"


def test_max_completion_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, max_completion_tokens=3, user="somebody", metadata={"a": "b"}
    )
    assert answer.usage.completion_tokens == 3
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("choice", ["none", "auto"])
def test_tools_that_need_not_be_called(client: openai.OpenAI, choice: Any) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, tools=[WEATHER, TIME], tool_choice=choice, temperature=0, max_tokens=40
    )
    message = answer.choices[0].message
    assert message.content or message.tool_calls
    assert choice == "auto" or not message.tool_calls


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("stream", [False, True])
def test_forced_tools(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    wanted: Any = {"model": "demo", "messages": MESSAGES, "tools": [WEATHER], "tool_choice": choice, "temperature": 0}
    wanted |= {"parallel_tool_calls": False}
    if stream:
        calls: dict[int, dict[str, str]] = {}
        reasons = []
        for chunk in client.chat.completions.create(stream=True, **wanted):
            (part,) = chunk.choices
            reasons.append(part.finish_reason)
            for delta in part.delta.tool_calls or []:
                call = calls.setdefault(delta.index, {"id": "", "name": "", "arguments": ""})
                call["id"] += delta.id or ""
                call["name"] += (delta.function.name if delta.function else None) or ""
                call["arguments"] += (delta.function.arguments if delta.function else None) or ""
        assert reasons[-1] == "tool_calls"
        assert set(reasons[:-1]) == {None}
        (found,) = calls.values()
    else:
        answer = client.chat.completions.create(**wanted)
        assert answer.choices[0].finish_reason == "tool_calls"
        assert answer.choices[0].message.content is None
        (call,) = answer.choices[0].message.tool_calls
        assert call.type == "function"
        found = {"id": call.id, "name": call.function.name, "arguments": call.function.arguments}
    assert found["id"].startswith("call_")
    assert found["name"] == "weather"
    Forecast.model_validate_json(found["arguments"])


def test_a_conversation_with_a_tools_result(client: openai.OpenAI) -> None:
    asked = client.chat.completions.create(
        model="demo", messages=MESSAGES, tools=[WEATHER], tool_choice=NAMED, temperature=0
    )
    message = asked.choices[0].message
    told: Any = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": '{"sun": true}'}
    answer = client.chat.completions.create(
        model="demo",
        messages=[*MESSAGES, message.model_dump(), told],
        tools=[WEATHER],
        tool_choice="none",
        max_tokens=9,
    )
    assert answer.choices[0].message.content


def test_structured_output(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(model="demo", messages=MESSAGES, response_format=Forecast, temperature=0)
    assert isinstance(parsed.choices[0].message.parsed, Forecast)
    with client.chat.completions.stream(
        model="demo", messages=MESSAGES, response_format=Forecast, temperature=0
    ) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed.choices[0].message.parsed
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(model="demo", messages=MESSAGES, response_format=form, temperature=0)
    Forecast.model_validate_json(answer.choices[0].message.content)


def test_json_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, response_format={"type": "json_object"}, temperature=0, max_tokens=400
    )
    if answer.choices[0].finish_reason == "stop":  # the model was not taught to close what it opens
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    else:
        assert answer.choices[0].message.content.lstrip().startswith("{")


def test_completions(client: openai.OpenAI) -> None:
    wanted: Any = {"model": "demo", "prompt": ["A node", "The mesh"], "temperature": 0, "max_tokens": 8, "echo": True}
    answer = client.completions.create(**wanted)
    texts = [choice.text for choice in answer.choices]
    assert [text.startswith(prompt) for text, prompt in zip(texts, wanted["prompt"], strict=True)] == [True, True]
    streamed = ["", ""]
    chunks = list(client.completions.create(stream=True, stream_options={"include_usage": True}, **wanted))
    for chunk in chunks:
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    assert len(client.completions.create(model="demo", prompt="A", max_tokens=3, logprobs=2).choices) == 1


def test_models(each_client: openai.OpenAI) -> None:
    assert "demo" in [model.id for model in each_client.models.list()]
    assert each_client.models.retrieve("demo").object == "model"
    with pytest.raises(openai.NotFoundError):
        each_client.models.retrieve("org/absent")


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_embeddings(mesh: Any, client: openai.OpenAI, encoding: Any) -> None:
    options: Any = {} if encoding is None else {"encoding_format": encoding}
    answer = client.embeddings.create(model=mesh.embedding_model, input=["A node", "The mesh"], **options)
    assert [row.index for row in answer.data] == [0, 1]
    assert answer.usage.prompt_tokens > 0
    if encoding != "base64":
        for row in answer.data:
            assert sum(value * value for value in row.embedding) == pytest.approx(1, abs=1e-3)


def test_a_wrong_key_is_401(mesh: Any) -> None:
    with pytest.raises(openai.AuthenticationError) as raised:
        openai.OpenAI(base_url=mesh.url, api_key="sk-wrong-key", max_retries=0).models.list()
    assert raised.value.code == "invalid_api_key"


def test_an_unknown_model_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(model="absent", messages=MESSAGES)
    assert raised.value.code == "model_not_found"
    assert raised.value.param == "model"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"n": 0}, "n"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages[0].role"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"extra_body": {"guided_regex": "(unclosed"}}, "guided_regex"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_field_is_400_that_names_it(
    client: openai.OpenAI, fields: dict[str, Any], param: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**({"model": "demo", "messages": MESSAGES, "stream": stream} | fields))
    assert raised.value.param == param
    assert raised.value.type == "invalid_request_error"


def test_unknown_fields_are_accepted(client: openai.OpenAI) -> None:
    client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=1, extra_body={"no_such_field": 1})


def test_a_key_for_other_models_is_403(mesh: Any) -> None:
    key = mesh.limited_key("openai-python-other", models=["other"])
    with pytest.raises(openai.PermissionDeniedError):
        openai.OpenAI(base_url=mesh.url, api_key=key, max_retries=0).chat.completions.create(
            model="demo", messages=MESSAGES
        )


def test_requests_per_minute_are_429_with_headers(mesh: Any) -> None:
    key = mesh.limited_key("openai-python-minute", requests_per_minute=2)
    client = openai.OpenAI(base_url=mesh.url, api_key=key, max_retries=0)
    for left in ("1", "0"):
        answer = client.chat.completions.with_raw_response.create(model="demo", messages=MESSAGES, max_tokens=1)
        assert answer.headers["x-ratelimit-limit-requests"] == "2"
        assert answer.headers["x-ratelimit-remaining-requests"] == left
    with pytest.raises(openai.RateLimitError) as raised:
        client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=1)
    assert raised.value.code == "rate_limit_exceeded"
    assert raised.value.type == "requests"
    assert 0 < int(raised.value.response.headers["retry-after"]) < 60
    assert 0 < int(raised.value.response.headers["retry-after-ms"]) < 60_000


def test_the_clients_own_retries_wait_out_a_limit(mesh: Any) -> None:
    key = mesh.limited_key("openai-python-concurrency", concurrency=1)
    client = openai.OpenAI(base_url=mesh.url, api_key=key, max_retries=8, timeout=60)
    running = client.chat.completions.create(model="demo", messages=MESSAGES, stream=True, **LONG)
    next(iter(running))
    with pytest.raises(openai.RateLimitError) as raised:
        client.with_options(max_retries=0).chat.completions.create(model="demo", messages=MESSAGES, max_tokens=1)
    assert raised.value.response.headers["retry-after"] == "1"
    refused = threading.Event()

    def note(response: Any) -> None:
        if response.status_code == 429:
            refused.set()

    client._client.event_hooks["response"].append(note)
    closer = threading.Thread(target=lambda: (refused.wait(60), running.close()))
    closer.start()
    answer = client.chat.completions.with_raw_response.create(model="demo", messages=MESSAGES, max_tokens=1)
    closer.join()
    assert refused.is_set()
    assert int(answer.http_request.headers["x-stainless-retry-count"]) >= 1
    assert answer.parse().choices[0].finish_reason == "length"


def test_a_stream_outlives_its_node_and_retries_find_it_when_it_is_back(mesh: Any, client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=MESSAGES, **LONG).choices[0].message.content
    text, killed = "", ""
    for chunk in client.chat.completions.create(model="demo", messages=MESSAGES, stream=True, **LONG):
        text += chunk.choices[0].delta.content or ""
        if text and not killed:
            killed = mesh.ask("/kill-executor")["url"]
    assert text == whole
    away = openai.OpenAI(base_url=killed, api_key=mesh.key, max_retries=0, timeout=60)
    with pytest.raises(openai.APIConnectionError):
        away.models.list()
    mesh.ask("/revive")
    answer = away.with_options(max_retries=20).chat.completions.create(model="demo", messages=MESSAGES, max_tokens=1)
    assert answer.choices[0].finish_reason == "length"
