import json
from dataclasses import replace

import pytest

from nodes.api.chat_schema import parse_chat
from nodes.generation import GenerateRequest, Grammar, RequestInvalid

MESSAGE = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}


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
    nothing = {
        "n": 1,
        "tools": [],
        "tool_choice": "none",
        "logprobs": False,
        "top_logprobs": 0,
        "response_format": {"type": "text"},
        "presence_penalty": 0.0,
        "logit_bias": {},
        "functions": [],
        "function_call": "none",
        "modalities": ["text"],
        "audio": None,
        "prediction": None,
        "store": False,
        "service_tier": "auto",
        "verbosity": "medium",
        "reasoning_effort": None,
        "metadata": {"a": "b"},
        "user": "someone",
        "safety_identifier": "x",
        "prompt_cache_key": "y",
        "parallel_tool_calls": True,
        "stop_token_ids": [],
        "allowed_token_ids": None,
        "chat_template_kwargs": {},
        "skip_special_tokens": True,
        "use_beam_search": False,
        "length_penalty": 1.0,
        "best_of": 1,
    }
    assert generate(**nothing).sampling == generate().sampling
    assert generate(**nothing).tools == ""


def test_every_field_of_the_sampling_is_handed_on() -> None:
    sampling = generate(
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        logit_bias={"5": 1, "7": -100},
        logprobs=True,
        top_logprobs=3,
        top_k=40,
        min_p=0.1,
        repetition_penalty=1.2,
        min_tokens=2,
        ignore_eos=True,
        max_completion_tokens=9,
    ).sampling
    assert (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty) == (0.5, -0.5, 1.2)
    assert sampling.logit_bias == ((5, 1.0), (7, -100.0))
    assert (sampling.logprobs, sampling.top_k, sampling.min_p) == (3, 40, 0.1)
    assert (sampling.min_tokens, sampling.ignore_eos, sampling.max_tokens) == (2, True, 9)


def test_logprobs_without_a_number_are_those_of_the_chosen_tokens() -> None:
    assert generate(logprobs=True).sampling.logprobs == 0
    assert generate(logprobs=False).sampling.logprobs is None


def test_n_answers_differ_in_their_choice_alone() -> None:
    generations = parse_chat(body(n=3, seed=1)).plan("req_1", 600.0, "a").generations
    assert [generation.sampling.choice for generation in generations] == [0, 1, 2]
    first, *others = (replace(g, sampling=replace(g.sampling, choice=0)) for g in generations)
    assert others == [first, first]


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}},
            "json_schema",
            '{"type":"object"}',
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True}}}, "json_object", ""),
        ({"guided_json": {"type": "array"}}, "json_schema", '{"type":"array"}'),
        ({"guided_json": '{"type": "array"}'}, "json_schema", '{"type": "array"}'),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_choice": ["a", "b"]}, "choice", '["a", "b"]'),
        ({"guided_grammar": 'start: "a"'}, "grammar", 'start: "a"'),
        ({"structured_outputs": {"json": {"type": "array"}}}, "json_schema", '{"type":"array"}'),
        ({"structured_outputs": {"choice": ["a"]}}, "choice", '["a"]'),
        ({"structured_outputs": {"json_object": True}}, "json_object", ""),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_an_answer_must_look_like_is_a_grammar(fields: dict[str, object], kind: str, text: str) -> None:
    assert generate(**fields).sampling.grammar == Grammar(kind, text)


def test_messages_about_tools_are_handed_on() -> None:
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": "weather?", "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "rain"}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "assistant", "refusal": "never"},
    ]
    request = generate(messages=messages, tools=[TOOL])
    assert json.loads(request.messages[2]["tool_calls"]) == [CALL]
    assert [dict(message, tool_calls="") if "tool_calls" in message else message for message in request.messages] == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "weather?", "name": "ann"},
        {"role": "assistant", "content": "", "tool_calls": ""},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"role": "assistant", "content": "no"},
        {"role": "assistant", "content": "never"},
    ]
    assert json.loads(request.tools) == [TOOL]


@pytest.mark.parametrize(
    ("choice", "offered", "is_forced"),
    [
        (None, ["weather", "time"], False),
        ("auto", ["weather", "time"], False),
        ("none", [], False),
        ("required", ["weather", "time"], True),
        ({"type": "function", "function": {"name": "time"}}, ["time"], True),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "time"}}]},
            },
            ["time"],
            False,
        ),
    ],
)
def test_tool_choice_says_what_is_offered_and_whether_it_must_be_called(
    choice: object, offered: list[str], is_forced: bool
) -> None:
    other = {"type": "function", "function": {"name": "time"}}
    request = generate(tools=[TOOL, other], tool_choice=choice)
    assert [tool["function"]["name"] for tool in json.loads(request.tools or "[]")] == offered
    assert (request.sampling.grammar is not None) is is_forced


@pytest.mark.parametrize("stop", ["}", ["city", "x"]])
@pytest.mark.parametrize(
    ("fields", "applies"),
    [
        ({"tool_choice": "required"}, False),
        ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, False),
        ({"response_format": {"type": "json_object"}}, False),
        ({"tool_choice": "auto"}, True),
        ({"tool_choice": "none", "response_format": {"type": "json_object"}}, True),
    ],
    ids=["required", "named", "an object or calls", "auto", "none"],
)
def test_a_stop_string_cuts_no_call_that_a_grammar_binds(
    stop: str | list[str], fields: dict[str, object], applies: bool
) -> None:
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    assert generate(tools=[TOOL], stop=stop, **fields).sampling.stop == (texts if applies else ())


def test_a_schema_and_tools_together_allow_either() -> None:
    request = generate(tools=[TOOL], response_format={"type": "json_object"})
    assert request.sampling.grammar is not None
    assert "anyOf" in json.loads(request.sampling.grammar.text)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": {"word": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": "a", "tools": [TOOL]}, "guided_regex"),
        ({"guided_json": "{", "tools": [TOOL]}, "guided_json"),
        ({"guided_json": "[" * 100_000, "tools": [TOOL]}, "guided_json"),
        ({"structured_outputs": {"regex": "a", "grammar": "b"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"regex": "a", "regexp": None}}, "structured_outputs"),
        ({"structured_outputs": {"regex": 1}}, "structured_outputs.regex"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [TOOL | {"junk": "x" * 600_000}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"moderation": {"model": "x"}}, "moderation"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"verbosity": "low"}, "verbosity"),
        ({"prompt_cache_retention": "24h"}, "prompt_cache_retention"),
        ({"prompt_cache_options": {"mode": "explicit"}}, "prompt_cache_options"),
        ({"store": True}, "store"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"metadata": {"k": 5}}, "metadata"),
        ({"stop_token_ids": [5]}, "stop_token_ids"),
        ({"allowed_token_ids": [5, 6]}, "allowed_token_ids"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"best_of": 3}, "best_of"),
        ({"metadata": {str(i): "v" for i in range(17)}}, "metadata"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 9e-153}, "repetition_penalty"),  # which is 0 as float32
        ({"min_tokens": 5, "max_tokens": 3}, "min_tokens"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "y"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls[0].type"),
        ({"messages": [{"role": "assistant", "audio": {"id": "a"}}]}, "messages[0].audio"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "a"}}]}, "messages[0].function_call"),
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


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["a", 1], "stop[1] is a number, and should be a text"),
        (["a", None], "stop[1] is null, and should be a text"),
        (["a", ""], "stop[1] has 0 characters, and should have 1 to 256"),
        (["a", "b" * 257], "stop[1] has 257 characters, and should have 1 to 256"),
        ("b" * 257, "stop has 257 characters, and should have 1 to 256"),
        (["a"] * 17, "stop has 17 texts, and may have at most 16"),
        (7, "stop is a number, and should be a text, or a list of at most 16"),
        ({"a": 1}, "stop is an object, and should be a text, or a list of at most 16"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_stop_that_is_none_is_told_why(value: object, message: str) -> None:
    with pytest.raises(RequestInvalid) as raised:
        generate(stop=value)
    assert (str(raised.value), raised.value.param) == (message, message.split()[0])


STRUCTURED = "json, regex, choice, grammar"
FUNCTION_FORM = '{"type": "function", "function": {"name": NAME}}'
ALLOWED_FORM = (
    f'{{"type": "allowed_tools", "allowed_tools": {{"mode": "auto" or "required", "tools": [{FUNCTION_FORM}, ...]}}}}'
)
CHOICE_FORMS = f"'none', 'auto', 'required', {FUNCTION_FORM} or {ALLOWED_FORM}"
FLAT = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "function": {"name": "weather"}}]}
FORMATS = "'text', 'json_object' or 'json_schema'"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"structured_outputs": {"regexp": "a"}},
            f"structured_outputs: 'regexp' is none of its keys, which are {STRUCTURED} and json_object",
        ),
        (
            {"structured_outputs": {"regex": "a", "foo": 1}},
            f"structured_outputs: 'foo' is none of its keys, which are {STRUCTURED} and json_object",
        ),
        (
            {"structured_outputs": {}},
            f"structured_outputs says nothing; give it one of {STRUCTURED} or json_object, or leave it out",
        ),
        (
            {"structured_outputs": {"json": None}},
            f"structured_outputs says nothing; give it one of {STRUCTURED} or json_object, or leave it out",
        ),
        (
            {"structured_outputs": {"regex": "a", "choice": ["b"]}},
            "structured_outputs.regex and structured_outputs.choice both say what the answer must look like; send one",
        ),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"json": {}}},
            "response_format and structured_outputs.json both say what the answer must look like; send one",
        ),
        ({"response_format": {}}, f"response_format: its type is missing, and should be {FORMATS}"),
        ({"response_format": {"type": "xml"}}, f"response_format: its type should be {FORMATS}"),
        ({"response_format": "json"}, f"response_format is a text, and should be an object whose type is {FORMATS}"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
            "response_format.json_schema.name: String should match pattern '^[a-zA-Z0-9_-]{1,64}$'",
        ),
        ({"tool_choice": {"type": "function"}}, f"tool_choice of type 'function' should be {FUNCTION_FORM}"),
        ({"tool_choice": FLAT}, f"tool_choice of type 'allowed_tools' should be {ALLOWED_FORM}"),
        ({"tool_choice": "always"}, f"tool_choice is another text, and should be {CHOICE_FORMS}"),
        ({"tool_choice": {}}, f"tool_choice is an object of another type, and should be {CHOICE_FORMS}"),
        ({"tool_choice": 5}, f"tool_choice is a number, and should be {CHOICE_FORMS}"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text"}]}]},
            "messages[0].content: part 1 is of type 'text' and has no 'text'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content: part of type 'image_url': this model reads text only",
        ),
        ({"messages": []}, "messages: should be a list of at least 1 item, and has 0"),
        ({"guided_choice": ["a"] * 4097}, "guided_choice: should be a list of at most 4096 items, and has 4097"),
        (
            {"metadata": {str(i): "v" for i in range(17)}},
            "metadata: should be an object of at most 16 items, and has more",
        ),
        (
            {"logit_bias": {str(i): 1 for i in range(2000)}},
            "logit_bias: should be an object of at most 1024 items, and has more",
        ),
        ({"logit_bias": {"5": "much"}}, "logit_bias: each token's bias should be a number from -100 to 100"),
        ({"logit_bias": {"5": 101}}, "logit_bias: each token's bias should be a number from -100 to 100"),
        ({"logit_bias": {"word": 1}}, "logit_bias: its keys are token ids, of at most 9 digits"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_refusal_says_in_the_clients_words_what_is_wrong(fields: dict[str, object], message: str) -> None:
    with pytest.raises(RequestInvalid) as raised:
        generate(**{"tools": [TOOL], **fields} if "tool_choice" in fields else fields)
    assert str(raised.value) == message


def test_structured_outputs_that_ask_for_no_object_leave_the_answer_free() -> None:
    assert generate(structured_outputs={"json_object": False}).sampling.grammar is None


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[]", b"null", b'"x"', b'{"model": "\\ud800"}', b"[" * 5000])
def test_a_body_that_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(RequestInvalid):
        parse_chat(data)
