"""What the OpenAI API promises beside plain chat, by the official client against each node of a calm mesh."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack

import openai
import pytest

from tests.cluster.mesh import Mesh

QUESTION: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "How do I add a node?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Ulm", "Bonn"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: openai.types.chat.ChatCompletionFunctionToolParam = {
    "type": "function",
    "function": {"name": "weather", "parameters": SCHEMA, "strict": True},
}


@pytest.fixture
def clients(calm_mesh: Mesh) -> Iterator[list[openai.OpenAI]]:
    """One of each node."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(openai.OpenAI(base_url=f"{node.url}/v1", api_key="any", max_retries=0, timeout=60))
            for node in calm_mesh.nodes
        ]


def check(arguments: str) -> None:
    value = json.loads(arguments)
    assert set(value) == {"city", "days"}
    assert value["city"] in ("Ulm", "Bonn")
    assert value["days"] <= 9


def test_n_answers_of_a_seed_are_the_same_on_every_node(clients: list[openai.OpenAI]) -> None:
    found = set()
    for client in clients:
        answer = client.chat.completions.create(
            model="demo", messages=QUESTION, n=3, temperature=1.5, seed=5, max_tokens=20
        )
        assert answer.usage is not None
        single = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0, max_tokens=1)
        assert single.usage is not None
        assert answer.usage.prompt_tokens == single.usage.prompt_tokens
        assert answer.system_fingerprint == single.system_fingerprint
        assert str(answer.system_fingerprint).startswith("fp_")
        found.add(tuple(choice.message.content for choice in answer.choices))
    (texts,) = found
    assert len(set(texts)) == 3


def test_a_forced_call_follows_the_schema_whole_and_streamed(clients: list[openai.OpenAI]) -> None:
    for client in clients:
        chat = client.chat.completions
        answer = chat.create(
            model="demo",
            messages=QUESTION,
            tools=[WEATHER],
            tool_choice="required",
            parallel_tool_calls=False,  # the model was taught no tools: it would call until its context is full
            temperature=0,
        )
        assert answer.choices[0].finish_reason == "tool_calls"
        for call in answer.choices[0].message.tool_calls or ():
            assert call.type == "function"
            assert call.function.name == "weather"
            check(call.function.arguments)
        with chat.stream(
            model="demo",
            messages=QUESTION,
            tools=[WEATHER],
            tool_choice={"type": "function", "function": {"name": "weather"}},
            temperature=0,
        ) as stream:
            calls = stream.get_final_completion().choices[0].message.tool_calls
        assert calls is not None
        assert len(calls) == 1
        check(calls[0].function.arguments)


def test_an_answer_follows_a_schema(clients: list[openai.OpenAI]) -> None:
    for client in clients:
        answer = client.chat.completions.create(
            model="demo",
            messages=QUESTION,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
            seed=1,
        )
        check(str(answer.choices[0].message.content))


def test_a_schema_that_no_engine_can_use_is_a_400_that_names_the_field(clients: list[openai.OpenAI]) -> None:
    for client in clients:
        with pytest.raises(openai.BadRequestError) as raised:
            client.chat.completions.create(model="demo", messages=QUESTION, extra_body={"guided_regex": "(unclosed"})
        assert raised.value.param == "guided_regex"


def test_logprobs_are_told_and_are_no_secret_of_one_node(clients: list[openai.OpenAI]) -> None:
    found = set()
    for client in clients:
        answer = client.chat.completions.create(
            model="demo", messages=QUESTION, temperature=0, max_tokens=5, logprobs=True, top_logprobs=2
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert all(row.logprob <= 0 and len(row.top_logprobs) == 2 for row in logprobs.content)
        assert all(row.token == row.top_logprobs[0].token for row in logprobs.content)
        found.add(tuple(row.token for row in logprobs.content))
    assert len(found) == 1


def test_completions_of_several_prompts_echo_them_and_are_the_same_everywhere(clients: list[openai.OpenAI]) -> None:
    found = set()
    for client in clients:
        completions = client.completions
        answer = completions.create(model="demo", prompt=["A node", "The mesh"], echo=True, temperature=0, max_tokens=8)
        texts = [choice.text for choice in answer.choices]
        assert texts[0].startswith("A node")
        assert texts[1].startswith("The mesh")
        streamed = ["", ""]
        for chunk in completions.create(
            model="demo", prompt=["A node", "The mesh"], echo=True, temperature=0, max_tokens=8, stream=True
        ):
            streamed[chunk.choices[0].index] += chunk.choices[0].text
        assert streamed == texts
        found.add(tuple(texts))
    assert len(found) == 1


def test_token_ids_are_a_prompt_and_unknown_ones_are_refused(clients: list[openai.OpenAI]) -> None:
    for client in clients:
        answer = client.completions.create(model="demo", prompt=[5, 6, 7], max_tokens=3, temperature=0)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == 3
        with pytest.raises(openai.BadRequestError) as raised:
            client.completions.create(model="demo", prompt=[2**30], max_tokens=3)
        assert raised.value.param == "prompt"
