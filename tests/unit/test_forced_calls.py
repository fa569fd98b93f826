"""Calls that a grammar forces: what it lets through, and the reader of that."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import numpy as np
import pytest

from nodes.api.answer_pieces import CallArguments, CallStart, Content
from nodes.api.forced_calls import ForcedCallReader, calls_grammar, naming_the_tool
from nodes.api.tool_schema import OfferedTools
from nodes.engine.grammar import GrammarCompiler, GrammarInvalid
from nodes.engine.sampling import GrammarSpec
from nodes.model_tools.random_llama import IM_END, small_tokenizer

CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "note": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"city": {"type": "string", "enum": ["Ulm", "Bonn"]}},
}
TOOLS = (
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "time"}},
)
FORCED = OfferedTools(TOOLS, is_forced=True)
ONE = OfferedTools(TOOLS[:1], is_forced=True, is_single=True)


def allows(tools: OfferedTools, text: str, other_schema: dict[str, Any] | None = None) -> bool:
    """Whether the grammar lets the whole text through."""
    tokenizer = small_tokenizer(512)
    grammar = calls_grammar(tools, other_schema)
    matcher = GrammarCompiler(tokenizer.to_str(), 512, [IM_END]).compile(GrammarSpec("json_schema", grammar.text))
    for token_id in (*tokenizer.encode(text, add_special_tokens=False).ids, IM_END):
        matcher.prepare()
        row = np.zeros(512, np.float32)
        matcher.forbid(row)
        if row[token_id] != 0:
            return False
        matcher.accept(token_id)
    return True


@pytest.mark.parametrize(
    ("tools", "text", "is_allowed"),
    [
        (FORCED, '[{"name": "weather", "arguments": {"city": "Ulm"}}]', True),
        (FORCED, '[{"name": "time", "arguments": {}}, {"name": "weather", "arguments": {"city": "Bonn"}}]', True),
        (FORCED, '[{"name": "weather", "arguments": {"city": "Rome"}}]', False),
        (FORCED, '[{"name": "weather", "arguments": {}}]', False),
        (FORCED, '[{"name": "other", "arguments": {}}]', False),
        (FORCED, "[]", False),
        (FORCED, "Hello", False),
        (ONE, '[{"name": "weather", "arguments": {"city": "Ulm", "note": "x"}}]', True),
        (ONE, '[{"name": "time", "arguments": {}}]', False),
        (
            ONE,
            '[{"name": "weather", "arguments": {"city": "Ulm"}}, {"name": "weather", "arguments": {"city": "Ulm"}}]',
            False,
        ),
    ],
)
def test_the_grammar_lets_through_calls_that_follow_the_schema(
    tools: OfferedTools, text: str, is_allowed: bool
) -> None:
    assert allows(tools, text) is is_allowed


@pytest.mark.parametrize(
    ("text", "is_allowed"),
    [
        ('{"city": "Ulm"}', True),
        ('[{"name": "time", "arguments": {}}]', True),
        ('{"city": "Rome"}', False),
        ("[1]", False),
    ],
)
def test_beside_a_schema_an_answer_is_either(text: str, is_allowed: bool) -> None:
    assert allows(OfferedTools(TOOLS), text, CITY) is is_allowed


@pytest.mark.parametrize(
    "parameters",
    [
        {"$ref": "#/$defs/a", "$defs": {"a": CITY | {"$defs": {}, "properties": {"city": {"enum": ["Ulm"]}}}}},
        {"properties": {"city": {"enum": ["Ulm"]}}, "required": ["city"]},
        {"anyOf": [{"type": "object", "properties": {"city": {"enum": ["Ulm"]}}, "required": ["city"]}]},
    ],
    ids=["a reference", "no type", "a choice of types"],
)
def test_parameters_may_be_written_in_several_ways(parameters: dict[str, Any]) -> None:
    tools = OfferedTools(({"type": "function", "function": {"name": "f", "parameters": parameters}},), is_forced=True)
    assert allows(tools, '[{"name": "f", "arguments": {"city": "Ulm"}}]')
    assert not allows(tools, '[{"name": "f", "arguments": {"city": "Rome"}}]')
    assert not allows(tools, '[{"name": "f", "arguments": []}]')


@pytest.mark.parametrize(
    ("function", "has_free_arguments"),
    [({"name": "now"}, False), ({"name": "now", "parameters": {}}, True)],
    ids=["no parameters", "parameters of any kind"],
)
def test_a_function_without_parameters_is_called_with_none(function: dict[str, Any], has_free_arguments: bool) -> None:
    tools = OfferedTools(({"type": "function", "function": function},), is_forced=True)
    assert allows(tools, '[{"name": "now", "arguments": {}}]')
    assert allows(tools, '[{"name": "now", "arguments": {"zone": 1}}]') is has_free_arguments


UNIQUE = {"type": "object", "properties": {"x": {"type": "array", "uniqueItems": True}}}


@pytest.mark.parametrize(
    ("parameters", "other_schema", "message"),
    [
        (UNIQUE, None, "the parameters of 'f.1': keywords that are not supported: [\"uniqueItems\"]"),
        (CITY, UNIQUE, 'the answer\'s schema: keywords that are not supported: ["uniqueItems"]'),
        ({"$ref": "#/x"}, None, "the parameters of 'f.1': Pointer '/$defs/tool_f.1/x' does not exist"),
        ({"title": "x" * 70_000}, None, r"the calls of these tools: json_schema: 70\d\d\d bytes exceed 65536"),
    ],
    ids=["of a tool", "of the answer", "a reference", "too large"],
)
def test_a_schema_that_no_grammar_can_follow_is_told_by_its_tool(
    parameters: dict[str, Any], other_schema: dict[str, Any] | None, message: str
) -> None:
    tools = OfferedTools((*TOOLS, {"type": "function", "function": {"name": "f.1", "parameters": parameters}}))
    with pytest.raises(GrammarInvalid) as raised:
        allows(tools, "", other_schema)
    assert re.fullmatch(message.replace("[", r"\[").replace("$", r"\$"), naming_the_tool(str(raised.value)))


def read(pieces_of_text: list[str], *, may_be_content: bool = False) -> tuple[str, list[tuple[str, str]]]:
    reader = ForcedCallReader(may_be_content=may_be_content)
    content = ""
    calls: list[tuple[str, str]] = []
    for piece in [piece for text in pieces_of_text for piece in reader.feed(text)] + reader.finish():
        match piece:
            case Content(text):
                content += text
            case CallStart(index, name):
                assert index == len(calls)
                calls.append((name, ""))
            case CallArguments(index, text):
                assert index == len(calls) - 1
                calls[index] = (calls[index][0], calls[index][1] + text)
    return content, calls


WHOLE = ' [ {"name" : "weather", "arguments": {"city": "U}l\\"m", "x": [{}]} } , {"name":"time","arguments":{}}]'
CALLS = [("weather", '{"city": "U}l\\"m", "x": [{}]}'), ("time", "{}")]


@pytest.mark.parametrize("may_be_content", [False, True])
def test_calls_are_the_same_wherever_the_text_is_cut(may_be_content: bool) -> None:
    assert read(list(WHOLE), may_be_content=may_be_content) == ("", CALLS)
    for cut in range(len(WHOLE) + 1):
        assert read([WHOLE[:cut], WHOLE[cut:]], may_be_content=may_be_content) == ("", CALLS)
    rng = random.Random(1)
    for _ in range(50):
        cuts = sorted(rng.randrange(len(WHOLE)) for _ in range(5))
        pieces = [WHOLE[a:b] for a, b in zip([0, *cuts], [*cuts, len(WHOLE)], strict=True)]
        assert read(pieces, may_be_content=may_be_content) == ("", CALLS)


def test_arguments_are_passed_on_while_they_are_written() -> None:
    reader = ForcedCallReader()
    assert reader.feed('[{"name": "weather", "arguments": {"ci') == [
        CallStart(0, "weather"),
        CallArguments(0, '{"ci'),
    ]
    assert reader.feed('ty"') == [CallArguments(0, 'ty"')]


def test_what_is_cut_short_keeps_the_part_there_is() -> None:
    assert read(['[{"name": "weather", "arguments": {"city": "U']) == ("", [("weather", '{"city": "U')])
    assert read(['[{"name": "wea']) == ("", [])


def test_an_object_where_calls_are_possible_is_content() -> None:
    text = ' {"city": "[Ulm]"}'
    assert read(list(text), may_be_content=True) == (text, [])


def test_data_in_a_schema_is_no_reference() -> None:
    schema = {"type": "object", "properties": {"x": {"enum": [{"$ref": "#/a"}]}, "y": {"$ref": "#"}}}
    tools = OfferedTools(({"type": "function", "function": {"name": "f", "parameters": schema}},), is_forced=True)
    moved = json.loads(calls_grammar(tools).text)["$defs"]["tool_f"]["properties"]
    assert moved == {"x": {"enum": [{"$ref": "#/a"}]}, "y": {"$ref": "#/$defs/tool_f"}}
