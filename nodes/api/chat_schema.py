"""The body of POST /v1/chat/completions, and what it becomes inside."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from nodes.api.constraints import CONSTRAINT_FAULTS, Constraint, ConstraintFields, ResponseFormat, constraint_of
from nodes.api.forced_calls import calls_grammar
from nodes.api.schema import CHARS_SHOWN, TOKENS_MAX, VLLM_NOT_SERVED, Body, GenerationBody, parse
from nodes.api.tool_schema import OfferedTools, ToolChoice, ToolList, choice_fault, offered_tools
from nodes.generation import GenerateRequest, RequestInvalid

MESSAGES_MAX = 4_096
CONTENT_PARTS_MAX = 1_024
CALLS_MAX = 128  # of tools, in one message
TOP_LOGPROBS_MAX = 20  # as OpenAI's API
METADATA_MAX = 16

NOT_SERVED: dict[str, tuple[Any, ...]] = VLLM_NOT_SERVED | {
    "add_special_tokens": (False,),
    "best_of": (1,),
    "echo": (False,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "moderation": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "prompt_cache_options": ({},),
    "prompt_cache_retention": ("in_memory", "in-memory"),
}


class ContentPart(Body):
    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(Body):
    name: str = Field(max_length=256)
    arguments: str


class MessageToolCall(Body):
    id: str = Field(max_length=256)
    type: Literal["function"]
    function: CalledFunction


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[ContentPart], Field(fail_fast=True, max_length=CONTENT_PARTS_MAX)] | None = None
    name: str | None = Field(None, max_length=256)
    refusal: str | None = Field(None, description="What the assistant said instead of an answer")
    tool_calls: Annotated[list[MessageToolCall], Field(fail_fast=True, max_length=CALLS_MAX)] | None = None
    tool_call_id: str | None = Field(None, max_length=256)

    def for_model(self, index: int) -> dict[str, str]:
        """As templates know it, with text alone. Raises RequestInvalid."""
        path = f"messages[{index}]"
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        message = {"role": role, "content": self._text(path)}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            self._require(self.role == "assistant", path, "tool_calls", "only the assistant calls tools")
            calls = [call.model_dump(include={"id", "type", "function"}) for call in self.tool_calls]
            message["tool_calls"] = json.dumps(calls, ensure_ascii=False)
        if self.role == "tool":
            self._require(self.tool_call_id is not None, path, "tool_call_id", "a tool's message says of which call")
        if self.tool_call_id is not None:
            self._require(self.role == "tool", path, "tool_call_id", "only a tool's message has it")
            message["tool_call_id"] = self.tool_call_id
        for field in ("audio", "function_call"):
            self._require(not (self.model_extra or {}).get(field), path, field, "it is not served by this version")
        return message

    def _text(self, path: str) -> str:
        """The content as one string."""
        if not isinstance(self.content, list):
            self._require(
                self.content is not None or self.role == "assistant",
                path,
                "content",
                "it may be left out by none but the assistant",
            )
            return self.content or self.refusal or ""
        texts = []
        for index, part in enumerate(self.content):
            shown = part.type[:CHARS_SHOWN]
            is_text = part.type in ("text", "refusal")
            self._require(is_text, path, "content", f"part of type {shown!r}: this model reads text only")
            text = part.text if part.type == "text" else part.refusal
            self._require(text is not None, path, "content", f"part {index} is of type '{shown}' and has no '{shown}'")
            texts.append(text or "")
        return "".join(texts)

    def _require(self, is_so: bool, path: str, field: str, message: str) -> None:
        if not is_so:
            raise RequestInvalid(f"{path}.{field}: {message}", param=f"{path}.{field}")


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """What a chat request becomes: a generation for each choice, and how to read what the model writes.

    grammar_param: the field to name where the grammar is none. is_json_or_calls: the answer is an object, or calls in
    the form that nodes.api.forced_calls reads."""

    generations: tuple[GenerateRequest, ...]
    tools: OfferedTools
    grammar_param: str
    is_json_or_calls: bool


class ChatCompletionRequest(GenerationBody, ConstraintFields):
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MESSAGES_MAX)]
    max_completion_tokens: int | None = Field(None, ge=1, le=TOKENS_MAX)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS_MAX)
    response_format: ResponseFormat | None = None
    tools: ToolList | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    store: Literal[False] | None = Field(None, description="Nothing is stored.")
    service_tier: Literal["auto", "default"] | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        None, max_length=METADATA_MAX, description="Accepted; nothing depends on it."
    )
    safety_identifier: str | None = Field(None, description="Accepted; nothing depends on it.")
    prompt_cache_key: str | None = Field(None, description="Accepted; prompts are found by how they begin.")

    def plan(self, request_id: str, deadline_s: float, entry_node: str) -> ChatPlan:
        """Raises RequestInvalid for what the types alone cannot tell."""
        self.check()
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise RequestInvalid("max_tokens and max_completion_tokens are both given; send one", param="max_tokens")
        if self.top_logprobs and not self.logprobs:
            raise RequestInvalid("top_logprobs is allowed only with logprobs=true", param="top_logprobs")
        tools = offered_tools(self.tools, self.tool_choice, self.parallel_tool_calls)
        constraint = constraint_of(self, self.response_format)
        has_bound_calls = bool(tools.tools) and (tools.is_forced or constraint is not None)
        if has_bound_calls:
            constraint = _with_calls(constraint, tools)
        sampling = self.sampling(
            max_tokens=self.max_tokens or self.max_completion_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            grammar=constraint.grammar if constraint else None,
        )
        if has_bound_calls:
            # They are about text. A call that one of them cut would break its schema, and still be told as a call.
            sampling = replace(sampling, stop=())
        first = GenerateRequest(
            request_id=request_id,
            model=self.model,
            messages=tuple(message.for_model(index) for index, message in enumerate(self.messages)),
            sampling=sampling,
            deadline_s=deadline_s,
            entry_node=entry_node,
            tools=tools.json(),
        )
        choices = tuple(replace(first, sampling=replace(sampling, choice=i)) for i in range(self.choice_count))
        return ChatPlan(choices, tools, constraint.param if constraint else "", has_bound_calls and not tools.is_forced)


def _with_calls(constraint: Constraint | None, tools: OfferedTools) -> Constraint:
    """The grammar of answers that may, or must, be calls. A response_format says nothing of calls."""
    if tools.is_forced and (constraint is None or constraint.param == "response_format"):
        return Constraint(calls_grammar(tools), "tools")
    schema = None if constraint is None or tools.is_forced else constraint.object_schema
    if schema is None:
        param = constraint.param if constraint else "tools"
        raise RequestInvalid(f"{param} can go together with tools only where it is a schema of objects", param=param)
    return Constraint(calls_grammar(tools, schema), "tools")


def parse_chat(data: bytes) -> ChatCompletionRequest:
    """Raises RequestInvalid that names the field and what is wrong with it."""
    return parse(ChatCompletionRequest, data, NOT_SERVED, CONSTRAINT_FAULTS | {"tool_choice": choice_fault})
