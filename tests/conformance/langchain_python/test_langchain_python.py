"""LangChain's ChatOpenAI and OpenAI, and an agent that calls a tool."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, Literal

import openai
import pydantic
import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

QUESTION = "How do I add a node?"
LONG: Any = {"max_tokens": 900, "extra_body": {"ignore_eos": True}}


class Forecast(pydantic.BaseModel):
    """The weather of some days."""

    model_config = pydantic.ConfigDict(extra="forbid")

    city: Literal["Ulm", "Bonn"]
    days: int = pydantic.Field(ge=0, le=9)


@tool(args_schema=Forecast)
def weather(city: str, days: int) -> str:
    """The weather in a city."""
    return f"sun in {city} for {days} days"


@pytest.fixture
def make(mesh: Any) -> Any:
    def make(**options: Any) -> ChatOpenAI:
        shape: Any = {"model": mesh.model, "base_url": mesh.url, "api_key": mesh.key, "temperature": 0}
        return ChatOpenAI(**(shape | {"max_tokens": 24, "max_retries": 0, "timeout": 60} | options))

    return make


def read(chunks: Any) -> AIMessageChunk:
    chunks = list(chunks)
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    return total


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("with_usage", [True, False])
def test_chat_and_streaming(mesh: Any, make: Any, index: int, with_usage: bool) -> None:
    model = make(base_url=mesh.urls[index], stream_usage=with_usage)
    whole = model.invoke(QUESTION)
    assert isinstance(whole, AIMessage)
    assert whole.content
    assert whole.response_metadata["finish_reason"] in ("stop", "length")
    assert whole.response_metadata["model_name"] == mesh.model
    streamed = read(model.stream(QUESTION))
    assert streamed.content == whole.content
    assert streamed.response_metadata["finish_reason"] == whole.response_metadata["finish_reason"]
    if with_usage:  # whose two ways of telling it are to agree, and neither is to count twice
        assert streamed.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]
        assert streamed.usage_metadata["input_tokens"] == whole.usage_metadata["input_tokens"]
    else:
        assert streamed.usage_metadata is None


def test_async_and_batches(make: Any) -> None:
    model = make()
    whole = model.invoke(QUESTION).content

    async def stream() -> str:
        return "".join([chunk.content async for chunk in model.astream(QUESTION)])

    assert asyncio.run(stream()) == whole
    assert [answer.content for answer in model.batch([QUESTION] * 4)] == [whole] * 4


def test_n_seed_stop_and_logprobs(make: Any) -> None:
    model = make(n=3, seed=5, temperature=1.5)
    texts = [[one.text for one in model.generate([[HumanMessage(QUESTION)]]).generations[0]] for _ in range(2)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3
    text = make().invoke(QUESTION).content
    word = text.split()[3]
    assert make(stop=[word]).invoke(QUESTION).content == text[: text.index(word)]
    for answer in (
        make(max_tokens=8, logprobs=True, top_logprobs=2).invoke(QUESTION),
        read(make(max_tokens=8, logprobs=True, top_logprobs=2).stream(QUESTION)),
    ):
        assert len(answer.response_metadata["logprobs"]["content"]) == 8


@pytest.mark.parametrize("choice", ["none", "auto", "required", "weather"])
def test_tools_whole_and_streamed(make: Any, choice: str) -> None:
    model = make(max_tokens=200).bind_tools([weather], tool_choice=choice, parallel_tool_calls=False, strict=True)
    for answer in (model.invoke(QUESTION), read(model.stream(QUESTION))):
        if choice == "none":
            assert not answer.tool_calls
        if choice in ("none", "auto"):
            assert answer.content or answer.tool_calls
            continue
        (call,) = answer.tool_calls
        assert not answer.invalid_tool_calls
        assert call["name"] == "weather"
        Forecast.model_validate(call["args"])
        assert answer.response_metadata["finish_reason"] == "tool_calls"


def test_a_tools_result_goes_back_to_the_model(make: Any) -> None:
    model = make()
    asked = model.bind_tools([weather], tool_choice="weather").invoke(QUESTION, max_tokens=200)
    told = weather.invoke(asked.tool_calls[0])
    assert isinstance(told, ToolMessage)
    answer = model.bind_tools([weather], tool_choice="none").invoke([HumanMessage(QUESTION), asked, told])
    assert answer.content


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(make: Any, method: Any) -> None:
    model = make(max_tokens=200).with_structured_output(Forecast, method=method, strict=True)
    answer = model.invoke(QUESTION)
    assert isinstance(answer, Forecast)
    assert list(model.stream(QUESTION))[-1] == answer


def test_an_agent_asks_and_ends(make: Any) -> None:
    from langchain.agents import create_agent

    answer = create_agent(make(), [weather]).invoke({"messages": [HumanMessage(QUESTION)]}, {"recursion_limit": 8})
    assert answer["messages"][-1].content


def test_completions(mesh: Any) -> None:
    model = OpenAI(model=mesh.model, base_url=mesh.url, api_key=mesh.key, temperature=0, max_tokens=8, max_retries=0)
    text = model.invoke("A node")
    assert text
    assert "".join(model.stream("A node")) == text


def test_embeddings(mesh: Any) -> None:
    # Without check_embedding_ctx_length it would count tokens as OpenAI's own models do.
    model = OpenAIEmbeddings(
        model=mesh.embedding_model, base_url=mesh.url, api_key=mesh.key, check_embedding_ctx_length=False
    )
    rows = model.embed_documents(["A node", "The mesh"])
    assert len(rows) == 2
    for row in rows:
        assert sum(value * value for value in row) == pytest.approx(1, abs=1e-3)


def test_errors_are_those_of_the_client_below(mesh: Any, make: Any) -> None:
    with pytest.raises(openai.AuthenticationError):
        make(api_key="sk-wrong-key").invoke(QUESTION)
    with pytest.raises(openai.NotFoundError):
        make(model="absent").invoke(QUESTION)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        make(temperature=3).invoke(QUESTION)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        read(make(temperature=3).stream(QUESTION))
    limited = make(api_key=mesh.limited_key("langchain-minute", requests_per_minute=1))
    limited.invoke(QUESTION)
    with pytest.raises(openai.RateLimitError) as raised:
        limited.invoke(QUESTION)
    assert 0 < int(raised.value.response.headers["retry-after"]) < 60


def test_the_clients_own_retries_wait_out_a_limit(mesh: Any, make: Any) -> None:
    key = mesh.limited_key("langchain-concurrency", concurrency=1)
    running = make(api_key=key, **LONG).stream(QUESTION)
    next(running)
    with pytest.raises(openai.RateLimitError):
        make(api_key=key).invoke(QUESTION)
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(make(api_key=key, max_retries=8).invoke(QUESTION)))
    asking.start()
    asking.join(0.5)
    running.close()
    asking.join(60)
    assert answers[0].content


def test_a_stream_outlives_its_node_and_retries_find_it_when_it_is_back(mesh: Any, make: Any) -> None:
    whole = make(**LONG).invoke(QUESTION).content
    text, killed = "", ""
    for chunk in make(**LONG).stream(QUESTION):
        text += chunk.content
        if text and not killed:
            killed = mesh.ask("/kill-executor")["url"]
    assert text == whole
    with pytest.raises(openai.APIConnectionError):
        make(base_url=killed).invoke(QUESTION)
    mesh.ask("/revive")
    assert make(base_url=killed, max_retries=20).invoke(QUESTION).content
