"""The official Python client over the application, in process: what it asks for and what it makes of the answers."""

from __future__ import annotations

import importlib
from typing import Any

import openai
import pytest

from mesh.errors import ModelUnknown
from mesh.view import EMBEDDING
from nodes.generation import GenerateEvent, TokenLogprob, Usage
from tests.unit.scripted_api import ANSWER, Api, ScriptedDispatch, view

# The client leaves its generators to the garbage collector once it has read the end of a stream; trio says so.
pytestmark = pytest.mark.filterwarnings("ignore:Async generator '(httpx|openai):ResourceWarning")

MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
WEATHER: openai.types.chat.ChatCompletionFunctionToolParam = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object"}},
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Ulm"}}</tool_call>'


def client(api: Api) -> openai.AsyncOpenAI:
    # Which HTTP library it stands on depends on its version.
    library = importlib.import_module(openai.DefaultAsyncHttpxClient.__mro__[2].__module__.partition(".")[0])
    transport = library.ASGITransport(app=api.app)
    http_client = library.AsyncClient(transport=transport)
    return openai.AsyncOpenAI(base_url="http://test/v1", api_key="any", http_client=http_client, max_retries=0)


async def test_answers_whole_and_streamed() -> None:
    api = Api(ScriptedDispatch(*ANSWER))
    answer = await client(api).chat.completions.create(model="demo", messages=MESSAGES, n=2)
    assert [choice.message.content for choice in answer.choices] == ["Hello!", "Hello!"]
    texts = ["", ""]
    stream = await client(api).chat.completions.create(
        model="demo", messages=MESSAGES, n=2, stream=True, stream_options={"include_usage": True}
    )
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == ["Hello!", "Hello!"]
    assert chunk.usage is not None
    assert chunk.usage.completion_tokens == 6


async def test_its_stream_helper_puts_calls_together() -> None:
    events = [GenerateEvent(character, (1,)) for character in CALL]
    api = Api(ScriptedDispatch(*events, GenerateEvent("", (), "stop", Usage(5, len(events)))))
    async with client(api).chat.completions.stream(model="demo", messages=MESSAGES, tools=[WEATHER]) as stream:
        completion = await stream.get_final_completion()
    calls = completion.choices[0].message.tool_calls
    assert calls is not None
    assert (calls[0].function.name, calls[0].function.arguments) == ("weather", '{"city": "Ulm"}')
    assert completion.choices[0].finish_reason == "tool_calls"


async def test_logprobs_are_what_it_expects() -> None:
    rows = (TokenLogprob("Hi", -0.5, (("Hi", -0.5),)),)
    api = Api(ScriptedDispatch(GenerateEvent("Hi", (1,), "stop", Usage(1, 1), rows)))
    answer = await client(api).chat.completions.create(model="demo", messages=MESSAGES, logprobs=True, top_logprobs=1)
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].token == "Hi"
    legacy = await client(api).completions.create(model="demo", prompt="x", logprobs=1)
    assert legacy.choices[0].logprobs is not None
    assert legacy.choices[0].logprobs.top_logprobs == [{"Hi": -0.5}]


async def test_completions_and_models() -> None:
    api = Api(ScriptedDispatch(*ANSWER), view(models=("org/demo", "demo"), a="f1"))
    stream = await client(api).completions.create(model="demo", prompt=["a", "b"], stream=True)
    texts = ["", ""]
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["Hello!", "Hello!"]
    assert [model.id async for model in client(api).models.list()] == ["demo", "org/demo"]
    assert (await client(api).models.retrieve("org/demo")).id == "org/demo"


async def test_errors_are_of_its_own_types() -> None:
    api = Api(ScriptedDispatch(refusal=ModelUnknown("no such model")))
    with pytest.raises(openai.NotFoundError) as unknown:
        await client(api).chat.completions.create(model="x", messages=MESSAGES)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as invalid:
        await client(api).chat.completions.create(model="x", messages=MESSAGES, reasoning_effort="high")
    assert invalid.value.param == "reasoning_effort"
    with pytest.raises(openai.NotFoundError):
        await client(api).models.retrieve("org/absent")


@pytest.mark.parametrize("encoding", ["float", "base64", None])
async def test_embeddings_are_the_same_in_either_encoding_and_in_the_one_it_chooses(encoding: str | None) -> None:
    api = Api(ScriptedDispatch(), view(kind=EMBEDDING))
    options: dict[str, Any] = {} if encoding is None else {"encoding_format": encoding}
    answer = await client(api).embeddings.create(model="demo", input=["a", "b"], dimensions=3, **options)
    rows = [item.embedding for item in answer.data]
    if encoding == "base64":  # asked for by name, it comes as it is
        assert rows == ["AACAPwAAAD8AAIC+", "AAAAQAAAAD8AAIC+"]
    else:
        assert rows == [[1.0, 0.5, -0.25], [2.0, 0.5, -0.25]]
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens, answer.model) == (6, 6, "demo")
