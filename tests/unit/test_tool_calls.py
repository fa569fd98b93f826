"""Calls of tools told from content, in each model's form, however the text is cut."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable

import pytest

from nodes.api import tool_calls
from nodes.api.answer_pieces import CallArguments, CallStart, Content
from nodes.api.tool_calls import ToolCallReader

NAMES = frozenset({"weather", "time"})
WEATHER = '{"name": "weather", "arguments": {"city": "Ulm"}}'
LLAMA = '{"name": "weather", "parameters": {"city": "Ulm"}}'
TIME = '{"name": "time", "arguments": {}}'
ULM = ("weather", {"city": "Ulm"})
NOW: tuple[str, dict[str, str]] = ("time", {})
Calls = list[tuple[str, dict[str, str]]]

CASES: dict[str, tuple[str, str, Calls]] = {
    "hermes": (f"<tool_call>\n{WEATHER}\n</tool_call>", "", [ULM]),
    "hermes after content": (f"I look.\n\n<tool_call>{WEATHER}</tool_call>", "I look.", [ULM]),
    "hermes twice": (f"<tool_call>{WEATHER}</tool_call>\n<tool_call>\n{TIME}\n</tool_call>\n", "", [ULM, NOW]),
    "hermes between content": (f"A <tool_call>{WEATHER}</tool_call> B", "AB", [ULM]),
    "hermes without its end": (f"<tool_call>{WEATHER}", "", [ULM]),
    "hermes with half its end": (f"<tool_call>{WEATHER}</tool", "", [ULM]),
    "hermes with a tag in an argument": (
        '<tool_call>{"name": "weather", "arguments": {"city": "</tool_call>\\"}{"}}</tool_call>',
        "",
        [("weather", {"city": '</tool_call>"}{'})],
    ),
    "hermes with arguments as text": (
        '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Ulm\\"}"}</tool_call>',
        "",
        [ULM],
    ),
    "llama with its tag": (f"<|python_tag|>{LLAMA}", "", [ULM]),
    "llama without": (LLAMA, "", [ULM]),
    "llama after blanks": (f"\n\n{LLAMA}", "", [ULM]),
    "llama several": (f"{LLAMA}; {TIME}", "", [ULM, NOW]),
    "llama several with tags": (f"<|python_tag|>{LLAMA};<|python_tag|>{TIME}", "", [ULM, NOW]),
    "llama with a type": (
        '{"type": "function", "name": "weather", "parameters": {"city": "Ulm"}}',
        "",
        [ULM],
    ),
    "llama with a function": (
        '{"type": "function", "function": {"name": "weather", "parameters": {"city": "Ulm"}}}',
        "",
        [ULM],
    ),
    "llama and content": (f"{LLAMA}\nDone.", "Done.", [ULM]),
    "mistral": (f"[TOOL_CALLS][{WEATHER}, {TIME}]", "", [ULM, NOW]),
    "mistral with blanks": (f"[TOOL_CALLS] [{WEATHER}]", "", [ULM]),
    "mistral after content": (f"Well. [TOOL_CALLS][{WEATHER}]", "Well.", [ULM]),
    "mistral without its marker": (f" [{WEATHER},{TIME}]", "", [ULM, NOW]),
    "content": ("Hello, how are you? ", "Hello, how are you? ", []),
    "blanks": (" \n ", " \n ", []),
    "nothing": ("", "", []),
    "half a marker": ("a <tool_cal", "a <tool_cal", []),
    "other tags": ("<tool>x</tool> [TOOL] <|python|> <<tool_call", "<tool>x</tool> [TOOL] <|python|> <<tool_call", []),
    "a marker alone": ("see <tool_call>", "see <tool_call>", []),
    "a marker in prose": ("Write <tool_call> and more.", "Write <tool_call> and more.", []),
    "an unknown tool": (
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        [],
    ),
    "broken json": (
        '<tool_call>{"name": weather}</tool_call>',
        '<tool_call>{"name": weather}</tool_call>',
        [],
    ),
    "a call that was cut": ('<tool_call>{"name": "weather", "argu', '<tool_call>{"name": "weather", "argu', []),
    "a broken call and a whole one": (
        f"<tool_call>{{oops <tool_call>{WEATHER}</tool_call>",
        "<tool_call>{oops",
        [ULM],
    ),
    "another object": ('{"answer": 42, "more": [1, 2]} ', '{"answer": 42, "more": [1, 2]} ', []),
    "an object with a late name": (
        '{"why": "", "name": "weather", "arguments": {}}',
        '{"why": "", "name": "weather", "arguments": {}}',
        [],
    ),
    "another object with a marker in it": (
        f'{{"x": "<tool_call>{WEATHER}</tool_call>"}}',
        '{"x": ""}',
        [ULM],
    ),
    "an object like a call": ('{"name": "Ulm", "arguments": {}} ok', '{"name": "Ulm", "arguments": {}} ok', []),
    "another list": ("[1, 2, 3] and", "[1, 2, 3] and", []),
    "a list of which one is no call": (f"[{WEATHER}, 3]", f"[{WEATHER}, 3]", []),
    "a mentioned object": (f"It is {WEATHER}.", f"It is {WEATHER}.", []),
    "python code": ("<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    "a number that json lacks": (
        '<tool_call>{"name": "time", "arguments": {"x": NaN}}</tool_call>',
        '<tool_call>{"name": "time", "arguments": {"x": NaN}}</tool_call>',
        [],
    ),
}


def read(pieces_of_text: Iterable[str], *, is_single: bool = False) -> tuple[str, Calls, list[str]]:
    """Content, calls, and the pieces of content as they came."""
    reader = ToolCallReader(NAMES, is_single=is_single)
    pieces = [piece for text in pieces_of_text for piece in reader.feed(text)] + reader.finish()
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    contents: list[str] = []
    for piece in pieces:
        match piece:
            case Content(text):
                assert text
                contents.append(text)
            case CallStart(index, name):
                assert index == len(names)
                names[index], arguments[index] = name, ""
            case CallArguments(index, text):
                arguments[index] += text
    calls = [(names[index], json.loads(arguments[index])) for index in names]
    return "".join(contents), calls, contents


@pytest.mark.parametrize(("text", "content", "calls"), CASES.values(), ids=CASES)
def test_calls_and_content_are_the_same_wherever_the_text_is_cut(text: str, content: str, calls: Calls) -> None:
    assert read([text])[:2] == (content, calls)
    assert read(text)[:2] == (content, calls)
    for cut in range(len(text) + 1):
        assert read([text[:cut], text[cut:]])[:2] == (content, calls), text[:cut]


@pytest.mark.parametrize("seed", range(200))
def test_any_text_is_read_the_same_wherever_it_is_cut_and_without_loss(seed: int) -> None:
    rng = random.Random(seed)
    parts = ["<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", WEATHER, LLAMA, TIME, "{", "}", "[", "]"]
    parts += [" ", "\n", ";", '"', "\\", "word", "<", '{"name": "weather"']
    text = "".join(rng.choices(parts, k=rng.randrange(1, 14)))
    whole = read([text])[:2]
    assert read(text)[:2] == whole
    for _ in range(5):
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(4))
        assert read(text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True))[:2] == whole
    if not whole[1]:
        assert whole[0] == text, "what is no call is content as it stands"


def test_content_is_passed_on_as_it_comes() -> None:
    reader = ToolCallReader(NAMES)
    assert reader.feed("Hello") == [Content("Hello")]
    assert reader.feed(" world <") == [Content(" world")]
    assert reader.feed("b> x") == [Content(" <b> x")]


def test_an_object_that_is_no_call_is_passed_on_with_its_first_key() -> None:
    reader = ToolCallReader(NAMES)
    assert reader.feed('{"an') == [Content('{"an')]


def test_no_more_than_one_call_where_only_one_is_wanted() -> None:
    text = f"<tool_call>{WEATHER}</tool_call><tool_call>{TIME}</tool_call>"
    assert read([text], is_single=True)[:2] == ("", [ULM])


def test_a_call_without_end_is_content_once_it_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool_calls, "CALL_CHARS_MAX", 100)
    text = '<tool_call>{"name": "' + "x" * 200
    reader = ToolCallReader(NAMES)
    assert reader.feed(text) == [Content(text)]


def test_markers_without_calls_do_not_make_the_rest_be_read_again_and_again() -> None:
    text = '<tool_call>{"' * 20_000
    assert read([text])[0] == text
