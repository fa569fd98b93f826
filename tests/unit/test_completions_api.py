"""Completions: prompts in each form, what is refused, and the shapes of answers."""

from __future__ import annotations

from typing import Any

import pytest

from nodes.api.schema import TOKENS_MAX
from nodes.api.texts_or_ids import FORMS
from nodes.generation import GenerateEvent, TokenLogprob, Usage
from tests.unit.scripted_api import ANSWER, Api, ScriptedDispatch, events

ROWS = (TokenLogprob("Hel", -0.1, (("Hel", -0.1), ("Y", -2.0))), TokenLogprob("lo", -0.3, (("p", -0.2), ("x", -0.25))))


async def test_a_whole_answer_is_openais_object() -> None:
    api = Api(ScriptedDispatch(*ANSWER))
    answer = (await api.complete()).json()
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"] == [{"index": 0, "text": "Hello!", "logprobs": None, "finish_reason": "stop"}]
    assert answer["usage"]["total_tokens"] == 8
    request = api.dispatch.requests[0]
    assert (request.prompt, request.messages, request.sampling.max_tokens) == ("once", (), 16)
    assert api.dispatch.stream.is_closed


async def test_a_stream_has_the_same_form() -> None:
    api = Api(ScriptedDispatch(*ANSWER))
    *chunks, usage, done = events(await api.complete(stream=True, stream_options={"include_usage": True}))
    assert done == "[DONE]"
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "text": "Hel", "logprobs": None, "finish_reason": None}],
        [{"index": 0, "text": "lo", "logprobs": None, "finish_reason": None}],
        [{"index": 0, "text": "!", "logprobs": None, "finish_reason": "stop"}],
    ]
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 3)
    assert api.metrics.streams == [("demo", "success")]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2, 3], [(1, 2, 3)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ],
)
async def test_prompts_are_texts_or_ids_one_or_several(prompt: object, prompts: list[object]) -> None:
    api = Api(ScriptedDispatch(*ANSWER))
    answer = (await api.complete(prompt=prompt)).json()
    assert [request.prompt for request in api.dispatch.requests] == prompts
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(prompts)))
    assert answer["usage"]["prompt_tokens"] == 5 * len(prompts)


async def test_each_prompt_has_n_answers_and_counts_once() -> None:
    api = Api(ScriptedDispatch(*ANSWER))
    answer = (await api.complete(prompt=["a", "b"], n=2)).json()
    assert [(r.prompt, r.sampling.choice) for r in api.dispatch.requests] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert answer["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 12,
        "total_tokens": 22,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_an_echoed_prompt_comes_before_the_answer() -> None:
    api = Api(ScriptedDispatch(*ANSWER))
    assert (await api.complete(echo=True)).json()["choices"][0]["text"] == "onceHello!"
    *chunks, _ = events(await api.complete(echo=True, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "onceHello!"


async def test_logprobs_have_the_older_form() -> None:
    script = (GenerateEvent("Hel", (1,), logprobs=ROWS[:1]), GenerateEvent("lo", (2,), "stop", Usage(1, 2), ROWS[1:]))
    whole = (await Api(ScriptedDispatch(*script)).complete(logprobs=2)).json()["choices"][0]["logprobs"]
    assert whole == {
        "tokens": ["Hel", "lo"],
        "token_logprobs": [-0.1, -0.3],
        "top_logprobs": [{"Hel": -0.1, "Y": -2.0}, {"p": -0.2, "x": -0.25, "lo": -0.3}],
        "text_offset": [0, 3],
    }
    *chunks, _ = events(await Api(ScriptedDispatch(*script)).complete(logprobs=2, stream=True))
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks] == [[0], [3]]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": True, "logprobs": 1}, "logprobs"),
        ({"echo": True, "prompt": [1, 2]}, "echo"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": ["a"] * 33, "n": 2}, "n"),
        ({"n": 17}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stream_options": {}}, "stream_options"),
        ({"guided_regex": "a", "guided_json": {}}, "guided_regex"),
    ],
    ids=lambda value: str(value)[:60],
)
async def test_what_cannot_be_honoured_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    dispatch = ScriptedDispatch(*ANSWER)
    response = await Api(dispatch).complete(**fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"].partition("[")[0] == param
    assert dispatch.requests == []


@pytest.mark.parametrize(
    ("prompt", "param", "message"),
    [
        ([], "prompt", "is an empty list; give at least one text"),
        (["a"] * 65, "prompt", "has 65 prompts, and may have at most 64 prompts"),
        ([-1], "prompt[0]", f"is no token id: they are 0 to {TOKENS_MAX}"),
        ([[]], "prompt[0]", "is empty; give at least one token id"),
        ([1, "a"], "prompt[1]", "is a text, and should be a token id, a whole number"),
        (5, "prompt", f"is a number, and should be {FORMS}"),
    ],
    ids=lambda value: str(value)[:20],
)
async def test_what_is_no_prompt_is_told_why(prompt: object, param: str, message: str) -> None:
    error = (await Api(ScriptedDispatch(*ANSWER)).complete(prompt=prompt)).json()["error"]
    assert (error["param"], error["message"]) == (param, f"{param} {message}")


async def test_fields_that_ask_for_nothing_and_unknown_ones_are_accepted() -> None:
    response = await Api(ScriptedDispatch(*ANSWER)).complete(suffix=None, best_of=1, echo=False, something_new=1)
    assert response.status_code == 200
