"""Calls of tools that the model cannot help but make: their grammar, and the reader of what it lets through.

The form is a JSON list, [{"name": ..., "arguments": {...}}, ...], whose arguments follow the tool's schema. The grammar
fixes the order of the keys, so that arguments can be passed on while they are written.
"""

from __future__ import annotations

import json
import re
from typing import Any

from nodes.api.answer_pieces import CallArguments, CallStart, Content, Piece
from nodes.api.json_scanner import JsonScanner
from nodes.api.tool_schema import OfferedTools
from nodes.generation import Grammar

CALLS_MAX = 16  # in one answer: a model that has begun to call might not stop

# Of a function that says nothing of its parameters: as OpenAI's API, it has none.
NO_PARAMETERS = {"properties": {}, "additionalProperties": False}

_BEFORE_ARGUMENTS = re.compile(
    r'[\s\[\]{},]*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)', re.DOTALL
)
# As the engine names the definition in which a schema is wrong.
_AT_FAULT = re.compile(r"json_schema: \$defs/(answer|tool_[a-zA-Z0-9_.-]+): ", re.ASCII)
# What schemas hold as data, in which a "$ref" is none.
_DATA_KEYS = ("const", "enum", "default", "examples")


def calls_grammar(tools: OfferedTools, other_schema: dict[str, Any] | None = None) -> Grammar:
    """Of answers that are calls of these tools; or objects of the other schema, where there is one."""
    definitions: dict[str, Any] = {}
    calls = []
    for tool in tools.tools:
        name = tool["function"]["name"]
        parameters = tool["function"].get("parameters", NO_PARAMETERS)
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": name},
                    "arguments": _define(definitions, f"tool_{name}", {"type": "object"} | parameters),
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = {
        "type": "array",
        "items": calls[0] if len(calls) == 1 else {"anyOf": calls},
        "minItems": 1,
        "maxItems": 1 if tools.is_single else CALLS_MAX,
    }
    if other_schema is not None:
        schema = {"anyOf": [_define(definitions, "answer", other_schema), schema]}
    return Grammar("json_schema", json.dumps({**schema, "$defs": definitions}, separators=(",", ":")))


def naming_the_tool(refusal: str) -> str:
    """What an engine says against a grammar of calls, with the tool that it is about where the engine found it."""
    found = _AT_FAULT.match(refusal)
    if found is None:
        return f"the calls of these tools: {refusal}"
    whose = "the answer's schema" if found[1] == "answer" else f"the parameters of '{found[1].removeprefix('tool_')}'"
    return f"{whose}: {refusal[found.end() :]}"


def _define(definitions: dict[str, Any], name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Put a whole schema below another one; what it calls its root has moved."""
    definitions[name] = _moved(schema, f"#/$defs/{name}")
    return {"$ref": f"#/$defs/{name}"}


def _moved(schema: Any, root: str) -> Any:
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: value if key in _DATA_KEYS else _moved(value, root) for key, value in schema.items()}
    target = schema.get("$ref")
    if isinstance(target, str) and target.startswith("#"):
        moved["$ref"] = root + target[1:]
    return moved


class ForcedCallReader:
    """may_be_content: an answer that does not begin as a list is content."""

    def __init__(self, *, may_be_content: bool = False) -> None:
        self._may_be_content = may_be_content
        self._is_content = False
        self._buffer = ""
        self._scanner: JsonScanner | None = None  # of the arguments, while they are written
        self._index = -1

    def feed(self, text: str) -> list[Piece]:
        self._buffer += text
        pieces: list[Piece] = []
        if self._may_be_content and self._buffer.lstrip():
            self._may_be_content = False
            self._is_content = not self._buffer.lstrip().startswith("[")
        if self._is_content:
            pieces.append(Content(self._buffer))
            self._buffer = ""
            return pieces
        while self._buffer:
            if self._scanner is None:
                found = _BEFORE_ARGUMENTS.match(self._buffer)
                if found is None:
                    break
                self._index += 1
                self._scanner = JsonScanner()
                self._buffer = self._buffer[found.end() :]
                pieces.append(CallStart(self._index, json.loads(found.group(1))))
            end = self._scanner.feed(self._buffer)
            taken = self._buffer if end is None else self._buffer[:end]
            self._buffer = self._buffer[len(taken) :]
            if end is not None:
                self._scanner = None
            if taken:
                pieces.append(CallArguments(self._index, taken))
        return pieces

    def finish(self) -> list[Piece]:
        """An answer that was cut before a call's arguments began says nothing."""
        return []
