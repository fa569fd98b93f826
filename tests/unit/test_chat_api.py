"""Chat completions in every form: several answers, logprobs, calls of tools, and the official client."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from mesh.errors import NoCapacity
from nodes.attempts import Move
from nodes.generation import GenerateEvent, GenerationFailed, RequestInvalid, TokenLogprob, Usage
from tests.unit.scripted_api import ANSWER, Api, ScriptedDispatch, Step, events, view

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
LOGPROBS = (
    TokenLogprob("Hi", -0.1, (("Hi", -0.1), ("Yo", -2.5))),
    TokenLogprob("\N{REPLACEMENT CHARACTER}", -0.2, ()),
)
Chunks = list[dict[str, Any]]


def told(*texts: str, prompt: int = 5, reason: str = "stop") -> list[Step]:
    """Events that have these texts, one token each."""
    *before, last = texts
    steps: list[Step] = [GenerateEvent(text, (1,)) for text in before]
    return [*steps, GenerateEvent(last, (2,), reason, Usage(prompt, len(texts), 4))]


def of_choice(chunks: Chunks, index: int) -> Chunks:
    return [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]


async def stream(api: Api, **fields: Any) -> tuple[Chunks, object]:
    *chunks, last = events(await api.chat(stream=True, **fields))
    return chunks, last


async def test_n_answers_are_one_stream_each_choice_with_its_own_beginning_and_end() -> None:
    api = Api(ScriptedDispatch(scripts=[told("a", "b"), told("c"), [0.5, *told("d", "e", reason="length")]]))
    chunks, last = await stream(api, n=3, stream_options={"include_usage": True})
    assert last == "[DONE]"
    *chunks, usage = chunks
    for index, (text, reason) in enumerate([("ab", "stop"), ("c", "stop"), ("de", "length")]):
        choices = of_choice(chunks, index)
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in choices) == text
        assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + [reason]
        assert choices[-1]["delta"] == {}
    assert usage["choices"] == []
    assert usage["usage"]["prompt_tokens"] == 5
    assert usage["usage"]["completion_tokens"] == 5
    assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
    assert [request.sampling.choice for request in api.dispatch.requests] == [0, 1, 2]
    assert all(one.is_closed for one in api.dispatch.streams)
    assert api.metrics.streams == [("demo", "success")]


async def test_n_answers_as_one_object_count_the_prompt_once() -> None:
    api = Api(ScriptedDispatch(scripts=[told("a", "b"), told("c")]))
    answer = (await api.chat(n=2)).json()
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["ab", "c"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["prompt_tokens"] == 5
    assert answer["usage"]["completion_tokens"] == 3
    assert all(one.is_closed for one in api.dispatch.streams)


async def test_no_answer_waits_for_another(autojump_clock: trio.testing.MockClock) -> None:
    api = Api(ScriptedDispatch(scripts=[[3.0, *told("slow")], [0.1, *told("a", "b", "c")]]))
    chunks, _ = await stream(api, n=2)
    order = [choice["index"] for chunk in chunks for choice in chunk["choices"] if choice["delta"].get("content")]
    assert order == [1, 1, 1, 0]


@pytest.mark.parametrize("is_stream", [False, True])
async def test_one_answer_that_breaks_ends_them_all(is_stream: bool) -> None:
    scripts = [told("a", "b"), [GenerateEvent("c", (1,)), GenerationFailed("node b failed")]]
    api = Api(ScriptedDispatch(scripts=scripts))
    response = await api.chat(n=2, stream=is_stream)
    if is_stream:
        assert events(response)[-1]["error"]["message"] == "node b failed"
    else:
        assert response.status_code == 502
    assert all(one.is_closed for one in api.dispatch.streams)
    assert api.metrics.keys == [("anonymous", "error")]


async def test_a_failure_before_the_first_event_of_several_has_its_status() -> None:
    api = Api(ScriptedDispatch(scripts=[[5.0, *told("a")], [NoCapacity("all full", 3.0)]]))
    response = await api.chat(n=2, stream=True)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "3"


async def test_logprobs_have_openais_form() -> None:
    script = (GenerateEvent("Hi", (1,), logprobs=LOGPROBS[:1]), GenerateEvent("", (2,), "stop", None, LOGPROBS[1:]))
    first = {
        "token": "Hi",
        "logprob": -0.1,
        "bytes": [72, 105],
        "top_logprobs": [
            {"token": "Hi", "logprob": -0.1, "bytes": [72, 105]},
            {"token": "Yo", "logprob": -2.5, "bytes": [89, 111]},
        ],
    }
    half = {"token": "\N{REPLACEMENT CHARACTER}", "logprob": -0.2, "bytes": None, "top_logprobs": []}
    choice = (await Api(ScriptedDispatch(*script)).chat(logprobs=True, top_logprobs=2)).json()["choices"][0]
    assert choice["logprobs"] == {"content": [first, half], "refusal": None}
    chunks, _ = await stream(Api(ScriptedDispatch(*script)), logprobs=True, top_logprobs=2)
    assert [choice["logprobs"] for choice in of_choice(chunks, 0)] == [
        None,
        {"content": [first], "refusal": None},
        {"content": [half], "refusal": None},
        None,
    ]


async def test_the_fingerprint_of_the_model_is_in_every_object_and_chunk() -> None:
    api = Api(ScriptedDispatch(*ANSWER), view(a="0123456789abcdef", b="0123456789abcdef"))
    assert (await api.chat()).json()["system_fingerprint"] == "fp_0123456789"
    chunks, _ = await stream(api, stream_options={"include_usage": True})
    assert {chunk["system_fingerprint"] for chunk in chunks} == {"fp_0123456789"}


async def test_a_response_says_how_long_it_took_and_where() -> None:
    response = await Api(ScriptedDispatch(*ANSWER)).chat(n=2)
    assert int(response.headers["openai-processing-ms"]) >= 0
    assert response.headers["x-ai-cluster-node"] == "b"


async def test_the_service_tier_is_told_where_it_was_asked_for() -> None:
    api = Api(ScriptedDispatch(*ANSWER))
    assert (await api.chat(service_tier="auto")).json()["service_tier"] == "default"
    assert "service_tier" not in (await api.chat()).json()


CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Ulm"}}</tool_call>'
FORCED = '[{"name": "weather", "arguments": {"city": "Ulm"}}]'


@pytest.mark.parametrize(
    ("choice", "texts", "content"),
    [
        ("auto", ["I look. ", *CALL], "I look."),
        ("auto", [CALL], None),
        ("required", [*FORCED], None),
        ({"type": "function", "function": {"name": "weather"}}, [FORCED], None),
    ],
    ids=["auto, by characters", "auto", "required, by characters", "named"],
)
async def test_calls_are_openais_whole_and_streamed(choice: object, texts: list[str], content: str | None) -> None:
    fields = {"tools": [TOOL], "tool_choice": choice}
    whole = (await Api(ScriptedDispatch(*told(*texts))).chat(**fields)).json()["choices"][0]
    (call,) = whole["message"]["tool_calls"]
    assert whole["message"]["content"] == content
    assert whole["finish_reason"] == "tool_calls"
    assert set(call) == {"id", "type", "function"}
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Ulm"}'}

    chunks, _ = await stream(Api(ScriptedDispatch(*told(*texts))), **fields)
    choices = of_choice(chunks, 0)
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == (content or "")
    deltas = [delta for choice in choices for delta in choice["delta"].get("tool_calls", ())]
    assert deltas[0] == {
        "index": 0,
        "id": deltas[0]["id"],
        "type": "function",
        "function": {"name": "weather", "arguments": ""},
    }
    assert deltas[0]["id"].startswith("call_")
    assert all(set(delta) == {"index", "function"} for delta in deltas[1:])
    assert "".join(delta["function"]["arguments"] for delta in deltas) == '{"city": "Ulm"}'
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["tool_calls"]


async def test_forced_arguments_are_streamed_as_they_are_written() -> None:
    chunks, _ = await stream(Api(ScriptedDispatch(*told(*FORCED))), tools=[TOOL], tool_choice="required")
    deltas = [delta for choice in of_choice(chunks, 0) for delta in choice["delta"].get("tool_calls", ())]
    assert len(deltas) > 10


async def test_an_answer_without_a_call_is_content_where_tools_are_offered() -> None:
    choice = (await Api(ScriptedDispatch(*told("It ", "rains."))).chat(tools=[TOOL])).json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "It rains.", "refusal": None}
    assert choice["finish_reason"] == "stop"


async def test_without_tools_what_looks_like_a_call_is_content() -> None:
    choice = (await Api(ScriptedDispatch(*told(CALL))).chat(tools=[TOOL], tool_choice="none")).json()["choices"][0]
    assert choice["message"]["content"] == CALL


async def test_a_call_that_was_cut_at_the_limit_says_so() -> None:
    script = told('[{"name": "weather", "arguments": {"ci', reason="length")
    choice = (await Api(ScriptedDispatch(*script)).chat(tools=[TOOL], tool_choice="required")).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"ci'


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_free_call_that_a_stop_string_cut_is_content_and_no_call(is_stream: bool) -> None:
    cut = CALL[: CALL.index("city")]
    api = Api(ScriptedDispatch(*told(*cut)))
    if is_stream:
        choices = of_choice((await stream(api, tools=[TOOL], stop="city"))[0], 0)
        assert "".join(choice["delta"].get("content") or "" for choice in choices) == cut
        assert not any("tool_calls" in choice["delta"] for choice in choices)
    else:
        choices = (await api.chat(tools=[TOOL], stop="city")).json()["choices"]
        assert choices[0]["message"] == {"role": "assistant", "content": cut, "refusal": None}
    assert choices[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOL], "tool_choice": "required"}, "tools"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
async def test_a_grammar_that_the_node_refuses_is_the_field_that_asked_for_it(
    fields: dict[str, Any], param: str
) -> None:
    refusal = RequestInvalid("json_schema: too large", param="response_format")
    # This node's engine refuses at once, a peer's word comes with its first event.
    for dispatch in (ScriptedDispatch(refusal=refusal), ScriptedDispatch(refusal)):
        for is_stream in (False, True):
            response = await Api(dispatch).chat(stream=is_stream, **fields)
            assert response.status_code == 400
            assert response.json()["error"]["param"] == param


async def test_a_refusal_of_a_forced_call_names_its_tool() -> None:
    refusal = RequestInvalid("json_schema: $defs/tool_weather: no", param="response_format")
    response = await Api(ScriptedDispatch(refusal=refusal)).chat(tools=[TOOL], tool_choice="required")
    assert response.json()["error"]["message"] == "the parameters of 'weather': no"


async def test_a_late_refusal_of_a_grammar_names_the_field_in_the_error_frame(autojump_clock: trio.abc.Clock) -> None:
    refusal = RequestInvalid("regex: bad", param="response_format")
    response = await Api(ScriptedDispatch(3.0, refusal)).chat(stream=True, guided_regex="(")
    assert response.status_code == 200
    assert events(response)[-1]["error"]["param"] == "guided_regex"


async def test_a_stream_says_where_its_answer_goes_on_and_clients_need_not_know() -> None:
    move = Move("failover", "b", "c", "link")
    steps: list[Step] = [*told("a", "b", "c")]
    api = Api(ScriptedDispatch(steps[0], move, *steps[1:]))
    response = await api.chat(stream=True)
    assert response.headers["x-ai-cluster-node"] == "b"
    found = events(response)
    assert found.count(": failover b c link") == 1
    place = found.index(": failover b c link")
    text = [chunk["choices"][0]["delta"].get("content") for chunk in found[1:-1] if isinstance(chunk, dict)]
    assert text[:3] == ["a", "b", "c"]
    assert found[place + 1]["choices"][0]["delta"] == {"content": "b"}


async def test_an_answer_that_moved_before_its_headers_says_so_in_them_alone() -> None:
    api = Api(ScriptedDispatch(Move("retry", "a", "c", "link"), *told("a", "b")))
    response = await api.chat(stream=True)
    assert response.headers["x-ai-cluster-node"] == "c"
    assert "retry" not in response.text


async def test_without_a_move_a_stream_has_no_comment() -> None:
    assert not [
        block for block in events(await Api(ScriptedDispatch(*ANSWER)).chat(stream=True)) if str(block)[:1] == ":"
    ]
