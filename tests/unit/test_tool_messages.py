"""Tools in chat templates: those that know them, and those that do not."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest

from nodes.engine.chat_template import ChatTemplate, ChatTemplateError

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ülm"}'}}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
]
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
WRITTEN = (
    '<assistant>I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Ülm"}}\n</tool_call>'
    "<user><tool_response>\nrain\n</tool_response>"
)


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos_token="", eos_token="")


@pytest.mark.parametrize(
    ("source", "knows_tools"),
    [
        (PLAIN, False),
        ("{% if tools %}{{ tools }}{% endif %}", True),
        ("{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools }}", True),
        ("{% macro say(tools) %}{% endmacro %}", False),
    ],
)
def test_a_template_that_reads_tools_knows_them(source: str, knows_tools: bool) -> None:
    assert template(source).knows_tools is knows_tools


def test_a_template_that_knows_tools_gets_them_and_calls_with_tables_of_arguments() -> None:
    source = (
        "{{ tools[0].function.name }}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    )
    assert template(source).render(CONVERSATION, [TOOL]) == (
        'weather<user>weather?<assistant>I look.{"city": "Ülm"}<tool>rain'
    )


def test_without_tools_a_template_finds_none() -> None:
    assert template("{% if tools is none %}no{% endif %}").render(CONVERSATION) == "no"


@pytest.mark.parametrize("arguments", ["", "[1]", "nonsense", "null"])
def test_arguments_that_are_no_object_stay_as_they_are(arguments: str) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    source = "{% if tools %}{% endif %}{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    shown = template(source).render([{"role": "assistant", "content": "", "tool_calls": [call]}])
    assert shown == ("{}" if not arguments else f'"{arguments}"')


def test_for_other_templates_calls_and_results_are_written_into_the_text() -> None:
    assert template(PLAIN).render(CONVERSATION) == f"<user>weather?{WRITTEN}"


def test_for_other_templates_tools_are_told_in_the_first_message() -> None:
    text = template(PLAIN).render(CONVERSATION, [TOOL])
    assert text.startswith("<user>Functions can be called.")
    assert '\n{"name": "weather", "parameters": {"type": "object"}}\n' in text
    assert text.endswith(f"\n\nweather?{WRITTEN}")


def test_or_after_what_the_system_message_says() -> None:
    text = template(PLAIN).render([{"role": "system", "content": "Be kind."}, *CONVERSATION], [TOOL])
    assert text.startswith("<system>Be kind.\n\nFunctions can be called.")
    assert f"<user>weather?{WRITTEN}" in text


def test_messages_given_are_not_changed() -> None:
    before = repr(CONVERSATION)
    template(PLAIN).render(CONVERSATION, [TOOL])
    template("{{ tools }}").render(CONVERSATION, [TOOL])
    assert repr(CONVERSATION) == before


def test_large_tools_have_an_allowance_of_their_own() -> None:
    tools = [{"type": "function", "function": {"name": f"f{i}", "description": "x" * 1000}} for i in range(128)]
    assert len(template("{% for t in tools %}{{ t | tojson }}{% endfor %}").render(CONVERSATION, tools)) > 128_000


@pytest.mark.parametrize("source", [PLAIN, "{% if tools %}{% endif %}{{ messages[0].tool_calls | tojson }}"])
@pytest.mark.parametrize("depth", [100, 300, 900, 5_000, 100_000])
def test_arguments_nested_deep_are_rendered_or_refused(source: str, depth: int) -> None:
    arguments = '{"a":' * depth + "1" + "}" * depth
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    with suppress(ChatTemplateError):
        assert "a" in template(source).render([{"role": "assistant", "content": "", "tool_calls": [call]}])
