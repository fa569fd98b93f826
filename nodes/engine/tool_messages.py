"""Messages about tools as chat templates expect them, and for a template that knows no tools: as plain messages.

Templates read the arguments of a call as a table, where OpenAI's API has JSON text. A template without a word of tools
would drop them and the calls; then both are written into the conversation's text, with tags that models of the Hermes
and Qwen kind were trained on and that nodes.api.tool_calls reads back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]

CALL_TAGS = ("<tool_call>", "</tool_call>")
RESULT_TAGS = ("<tool_response>", "</tool_response>")
# The instruction names both tags, so that the model knows what to write and what will come back.
INSTRUCTION = (
    "Functions can be called. Each is described by one line of JSON:\n"
    "<tools>\n{tools}\n</tools>\n"
    "A call is written as JSON between tags, each call in tags of its own:\n"
    '<tool_call>\n{{"name": "the function", "arguments": {{"the parameter": "its value"}}}}\n</tool_call>\n'
    "What a call gives follows between <tool_response> and </tool_response>."
)


def for_templates(messages: Sequence[Message]) -> list[Message]:
    """The messages with each call's arguments as a table, where they are one."""
    return [
        {**message, "tool_calls": [_read_call(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def with_tools_written(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages with tools, calls and results in their text, and roles that every template knows."""
    plain = [_plain(message) for message in messages]
    if not tools:
        return plain
    lines = "\n".join(_json(tool.get("function", tool)) for tool in tools)
    text = INSTRUCTION.format(tools=lines)
    # Some templates refuse system messages, so none is added: without one, the first message says it.
    at = next((i for i, message in enumerate(plain) if message["role"] in ("system", "developer", "user")), None)
    if at is None:
        return [{"role": "user", "content": text}, *plain]
    first = plain[at]
    parts = [first["content"], text] if first["role"] != "user" else [text, first["content"]]
    plain[at] = {**first, "content": "\n\n".join(filter(None, parts))}
    return plain


def _plain(message: Message) -> Message:
    if message["role"] == "tool":
        return {"role": "user", "content": "\n".join((RESULT_TAGS[0], message["content"], RESULT_TAGS[1]))}
    if not message.get("tool_calls"):
        return message
    parts = [message["content"]] if message["content"] else []
    for call in message["tool_calls"]:
        function = _read_call(call)["function"]
        text = _json({"name": function["name"], "arguments": function["arguments"]})
        parts += [CALL_TAGS[0], text, CALL_TAGS[1]]
    return {"role": message["role"], "content": "\n".join(parts)}


def _read_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that are no JSON object, as a model may write them, stay text."""
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        arguments = function["arguments"]
    return {**call, "function": {**function, "arguments": arguments}}


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
