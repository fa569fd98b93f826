"""What clients may send, checked: the bodies of the OpenAI API as pydantic types, and what they become inside.

A documented field that this version cannot honour is refused by name, never ignored; unknown fields are accepted,
as OpenAI's API does.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nodes.generation import GenerateRequest, RequestInvalid, Sampling

STOP_STRINGS_MAX = 16
STOP_STRING_CHARS_MAX = 256
MESSAGES_MAX = 4_096
CONTENT_PARTS_MAX = 1_024
TOKENS_MAX = 2**31 - 1
# Of a client's own word in an error message.
CHARS_SHOWN = 100

# Documented fields that cannot be honoured yet, each with the one value that asks for nothing.
_NOT_SERVED: dict[str, Any] = {
    "n": 1,
    "logprobs": False,
    "top_logprobs": 0,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "tools": [],
    "tool_choice": "none",
    "functions": [],
    "function_call": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "audio": {},
    "prediction": {},
    "web_search_options": {},
}


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class ContentPart(_Body):
    type: str
    text: str | None = None


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[ContentPart], Field(fail_fast=True, max_length=CONTENT_PARTS_MAX)] | None = None

    def text(self, index: int) -> str:
        """The content as one string. Raises RequestInvalid for parts that are not text."""
        if not isinstance(self.content, list):
            return self.content or ""
        for part in self.content:
            if part.type != "text" or part.text is None:
                raise RequestInvalid(
                    f"content part of type {part.type[:CHARS_SHOWN]!r}: this model reads text only",
                    param=f"messages[{index}].content",
                )
        return "".join(part.text or "" for part in self.content)


class StreamOptions(_Body):
    include_usage: bool = False


StopString = Annotated[str, Field(min_length=1, max_length=STOP_STRING_CHARS_MAX)]


class ChatCompletionRequest(_Body):
    model: str = Field(min_length=1, max_length=256)
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MESSAGES_MAX)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(None, ge=1, le=TOKENS_MAX)
    max_completion_tokens: int | None = Field(None, ge=1, le=TOKENS_MAX)
    stop: StopString | Annotated[list[StopString], Field(fail_fast=True, max_length=STOP_STRINGS_MAX)] | None = None
    ignore_eos: bool | None = None

    def generate_request(self, request_id: str, deadline_s: float, entry_node: str) -> GenerateRequest:
        """Raises RequestInvalid for what the types alone cannot tell."""
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise RequestInvalid("max_tokens and max_completion_tokens are both given; send one", param="max_tokens")
        if self.stream_options is not None and not self.stream:
            raise RequestInvalid("stream_options is allowed only with stream=true", param="stream_options")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return GenerateRequest(
            request_id=request_id,
            model=self.model,
            messages=tuple(
                {"role": message.role, "content": message.text(index)} for index, message in enumerate(self.messages)
            ),
            sampling=Sampling(
                temperature=self.temperature,
                top_p=self.top_p,
                seed=self.seed,
                max_tokens=self.max_tokens or self.max_completion_tokens,
                stop=stop,
                ignore_eos=bool(self.ignore_eos),
            ),
            deadline_s=deadline_s,
            entry_node=entry_node,
        )


def parse_chat(body: bytes) -> ChatCompletionRequest:
    """The request in a JSON body. Raises RequestInvalid that names the field and what is wrong with it."""
    try:
        request = ChatCompletionRequest.model_validate_json(body)
    except ValidationError as exc:
        fault = exc.errors(include_url=False, include_input=False)[0]
        if fault["type"] == "json_invalid":
            raise RequestInvalid(f"the body is no JSON: {fault['ctx']['error']}", code="invalid_json") from exc
        param = _path(fault["loc"])
        message = f"{param}: {fault['msg']}" if param else f"the body must be a JSON object: {fault['msg']}"
        raise RequestInvalid(message, param=param or None) from exc
    for field, value in (request.model_extra or {}).items():
        if field in _NOT_SERVED and value is not None and value != _NOT_SERVED[field]:
            raise RequestInvalid(f"{field} is not served by this version", param=field, code="unsupported_parameter")
    return request


def _path(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") → "messages[0].role"; the names pydantic adds for members of a union are left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "constrained"):
            path += f".{part}" if path else part
    return path
