"""LiteLLM as a library: what it makes of answers, and of errors, in its own types."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, Literal

import litellm
import pydantic
import pytest

MESSAGES: Any = [{"role": "user", "content": "How do I add a node?"}]
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
NAMED: Any = {"type": "function", "function": {"name": "weather"}}


class Forecast(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    city: Literal["Ulm", "Bonn"]
    days: int = pydantic.Field(ge=0, le=9)


@pytest.fixture
def options(mesh: Any) -> dict[str, Any]:
    return {"model": f"openai/{mesh.model}", "api_base": mesh.url, "api_key": mesh.key, "messages": MESSAGES}


GREEDY: Any = {"temperature": 0, "max_tokens": 24, "max_retries": 0}


def chat(options: dict[str, Any], **fields: Any) -> Any:
    return litellm.completion(**(options | GREEDY | fields))


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("with_usage", [True, False])
def test_chat_and_streaming(mesh: Any, options: dict[str, Any], index: int, with_usage: bool) -> None:
    options |= {"api_base": mesh.urls[index]}
    whole = chat(options)
    assert whole.choices[0].message.content
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    fields: Any = {"stream_options": {"include_usage": True}} if with_usage else {}
    chunks = list(chat(options, stream=True, **fields))
    rebuilt = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
    assert rebuilt.choices[0].message.content == whole.choices[0].message.content
    assert rebuilt.choices[0].finish_reason == whole.choices[0].finish_reason
    if with_usage:
        assert rebuilt.usage.completion_tokens == whole.usage.completion_tokens
        assert rebuilt.usage.prompt_tokens == whole.usage.prompt_tokens


def test_async_streaming(options: dict[str, Any]) -> None:
    async def read() -> str:
        stream = await litellm.acompletion(**options, **GREEDY, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(read()) == chat(options).choices[0].message.content


def test_n_seed_stop_and_logprobs(options: dict[str, Any]) -> None:
    found = [chat(options, n=3, seed=5, temperature=1.5) for _ in range(2)]
    texts = [[choice.message.content for choice in answer.choices] for answer in found]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3
    text = chat(options).choices[0].message.content
    word = text.split()[3]
    assert chat(options, stop=[word]).choices[0].message.content == text[: text.index(word)]
    rows = chat(options, max_tokens=8, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert len(rows) == 8
    assert all(len(row.top_logprobs) == 2 for row in rows)


@pytest.mark.parametrize("choice", ["none", "auto", "required", NAMED], ids=["none", "auto", "required", "named"])
def test_tools_whole_and_streamed(options: dict[str, Any], choice: Any) -> None:
    fields: Any = {"tools": [WEATHER], "tool_choice": choice, "max_tokens": 200, "parallel_tool_calls": False}
    whole = chat(options, **fields)
    rebuilt = litellm.stream_chunk_builder(list(chat(options, stream=True, **fields)), messages=MESSAGES)
    for answer in (whole, rebuilt):
        message = answer.choices[0].message
        if choice == "none":
            assert not message.tool_calls
        if choice in ("none", "auto"):
            assert message.content or message.tool_calls
            continue
        assert answer.choices[0].finish_reason == "tool_calls"
        (call,) = message.tool_calls
        assert call.id.startswith("call_")
        assert call.function.name == "weather"
        Forecast.model_validate_json(call.function.arguments)


@pytest.mark.parametrize(
    "form",
    [Forecast, {"type": "json_schema", "json_schema": {"name": "forecast", "schema": SCHEMA, "strict": True}}],
    ids=["pydantic", "json_schema"],
)
def test_structured_output(options: dict[str, Any], form: Any) -> None:
    answer = chat(options, response_format=form, max_tokens=200)
    Forecast.model_validate_json(answer.choices[0].message.content)


def test_completions(mesh: Any) -> None:
    wanted: Any = {"model": f"text-completion-openai/{mesh.model}", "api_base": mesh.url, "api_key": mesh.key}
    wanted |= {"prompt": "A node", "temperature": 0, "max_tokens": 8}
    text = litellm.text_completion(**wanted).choices[0].text
    assert text
    assert "".join(chunk.choices[0].text or "" for chunk in litellm.text_completion(stream=True, **wanted)) == text


def test_embeddings(mesh: Any) -> None:
    answer = litellm.embedding(
        model=f"openai/{mesh.embedding_model}", input=["A node", "The mesh"], api_base=mesh.url, api_key=mesh.key
    )
    assert [row["index"] for row in answer.data] == [0, 1]
    for row in answer.data:
        assert sum(value * value for value in row["embedding"]) == pytest.approx(1, abs=1e-3)


def test_models(mesh: Any) -> None:
    assert mesh.model in litellm.get_valid_models(
        check_provider_endpoint=True, custom_llm_provider="openai", api_key=mesh.key, api_base=mesh.url
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"api_key": "sk-wrong-key"}, litellm.AuthenticationError),
        ({"model": "openai/absent"}, litellm.NotFoundError),
        ({"temperature": 3}, litellm.BadRequestError),
        ({"extra_body": {"guided_regex": "(unclosed"}}, litellm.BadRequestError),
    ],
    ids=["key", "model", "field", "grammar"],
)
def test_errors_are_of_their_types(options: dict[str, Any], fields: Any, kind: Any, stream: bool) -> None:
    with pytest.raises(kind):
        chat(options | fields, stream=stream, **{k: v for k, v in fields.items() if k == "temperature"})


def test_a_context_that_is_too_long_is_known_as_such(options: dict[str, Any]) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        chat(options | {"messages": [{"role": "user", "content": "node " * 5_000}]})


def test_limits_are_rate_limit_errors(mesh: Any, options: dict[str, Any]) -> None:
    key = mesh.limited_key("litellm-minute", requests_per_minute=1)
    chat(options | {"api_key": key})
    with pytest.raises(litellm.RateLimitError) as raised:
        chat(options | {"api_key": key})
    assert 0 < int(raised.value.response.headers["retry-after"]) < 60


def test_the_clients_own_retries_wait_out_a_limit(mesh: Any, options: dict[str, Any]) -> None:
    options |= {"api_key": mesh.limited_key("litellm-concurrency", concurrency=1)}
    running = chat(options, stream=True, max_tokens=900, extra_body={"ignore_eos": True})
    next(iter(running))
    with pytest.raises(litellm.RateLimitError):
        chat(options)
    closer = threading.Timer(0.5, lambda: running.completion_stream.close())
    closer.start()
    answer = chat(options, max_retries=8)
    closer.join()
    assert answer.choices[0].message.content


def test_a_stream_outlives_its_node_and_retries_find_it_when_it_is_back(mesh: Any, options: dict[str, Any]) -> None:
    long: Any = {"max_tokens": 900, "extra_body": {"ignore_eos": True}}
    whole = chat(options, **long).choices[0].message.content
    text, killed = "", ""
    for chunk in chat(options, stream=True, **long):
        text += chunk.choices[0].delta.content or ""
        if text and not killed:
            killed = mesh.ask("/kill-executor")["url"]
    assert text == whole
    with pytest.raises((litellm.APIConnectionError, litellm.InternalServerError)):
        chat(options | {"api_base": killed})
    mesh.ask("/revive")
    assert chat(options | {"api_base": killed}, max_retries=20).choices[0].message.content
