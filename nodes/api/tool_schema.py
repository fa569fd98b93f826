"""Tools that a model may call, and which of them it is to call, as clients send them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from nodes.api.body_faults import json_word
from nodes.api.schema import Body
from nodes.generation import RequestInvalid

TOOLS_MAX = 128  # as OpenAI's API
TOOLS_BYTES_MAX = 512 * 1024  # with each request they travel to the node that serves it, and through its template

# By type, the objects that tool_choice may be, as a message shows them.
CHOICE_FORMS = {
    "function": '{"type": "function", "function": {"name": NAME}}',
    "allowed_tools": (
        '{"type": "allowed_tools", "allowed_tools": {"mode": "auto" or "required", '
        '"tools": [{"type": "function", "function": {"name": NAME}}, ...]}}'
    ),
}

ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class ToolFunction(Body):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON Schema of an object")
    strict: bool | None = Field(
        None,
        description="Calls that tool_choice forces follow the schema either way; under auto nothing does.",
    )


class Tool(Body):
    type: Literal["function"]
    function: ToolFunction


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


class AllowedToolNames(Body):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=TOOLS_MAX)]


class AllowedTools(Body):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedToolNames


ToolList = Annotated[list[Tool], Field(fail_fast=True, max_length=TOOLS_MAX)]
ToolChoice = Literal["none", "auto", "required"] | Annotated[NamedTool | AllowedTools, Field(discriminator="type")]


@dataclass(frozen=True, slots=True)
class OfferedTools:
    """What the model is told of, and what it may or must do with it. tools: as the client sent them, without nulls."""

    tools: tuple[dict[str, Any], ...] = ()
    is_forced: bool = False
    is_single: bool = False  # one call at most

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool["function"]["name"] for tool in self.tools)

    def json(self) -> str:
        return json.dumps(self.tools, ensure_ascii=False, separators=(",", ":")) if self.tools else ""


def offered_tools(tools: list[Tool] | None, choice: ToolChoice | None, parallel: bool | None) -> OfferedTools:
    """Raises RequestInvalid where the choice names tools that are not there, or the tools are too large."""
    for index, tool in enumerate(tools or ()):
        if (tool.function.parameters or {}).get("type", "object") != "object":
            path = f"tools[{index}].function.parameters"
            raise RequestInvalid(f"{path}: arguments are an object, so its type is one", param=path)
    known = {tool.function.name: tool.model_dump(exclude_none=True) for tool in tools or ()}
    if len(known) < len(tools or ()):
        raise RequestInvalid("two tools have the same name", param="tools")
    if not known:
        if choice not in (None, "none", "auto"):
            raise RequestInvalid("tool_choice is given without tools", param="tool_choice")
        return OfferedTools()
    if choice == "none":
        return OfferedTools()
    is_single = parallel is False
    match choice:
        case NamedTool():
            offered = OfferedTools((_named(known, choice.function.name),), is_forced=True, is_single=True)
        case AllowedTools():
            names = dict.fromkeys(tool.function.name for tool in choice.allowed_tools.tools)
            allowed = tuple(_named(known, name) for name in names)
            offered = OfferedTools(allowed, choice.allowed_tools.mode == "required", is_single)
        case _:
            offered = OfferedTools(tuple(known.values()), choice == "required", is_single)
    size = len(offered.json().encode())
    if size > TOOLS_BYTES_MAX:
        raise RequestInvalid(f"the tools have {size} bytes, which exceeds {TOOLS_BYTES_MAX}", param="tools")
    return offered


def choice_fault(value: object) -> RequestInvalid:
    """Why this is no tool_choice: the form of its type, or all that there are."""
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind in CHOICE_FORMS:
        return RequestInvalid(f"tool_choice of type '{kind}' should be {CHOICE_FORMS[kind]}", param="tool_choice")
    given = "an object of another type" if isinstance(value, dict) else json_word(value)
    given = "another text" if isinstance(value, str) else given
    forms = f"'none', 'auto', 'required', {' or '.join(CHOICE_FORMS.values())}"
    return RequestInvalid(f"tool_choice is {given}, and should be {forms}", param="tool_choice")


def _named(known: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    if name not in known:
        raise RequestInvalid(f"tool_choice names a function that tools lacks: {name[:64]!r}", param="tool_choice")
    return known[name]
