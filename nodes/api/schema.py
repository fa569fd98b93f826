"""What clients may send, checked: what the bodies of the OpenAI API share, as pydantic types.

A documented field that this version cannot honour is refused by name, never ignored; unknown fields are accepted,
as OpenAI's API does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from nodes.generation import Grammar, RequestInvalid, Sampling

STOP_STRINGS_MAX = 16
STOP_STRING_CHARS_MAX = 256
TOKENS_MAX = 2**31 - 1
CHOICES_MAX = 16  # n; each is a generation of its own
LOGIT_BIASES_MAX = 1_024
# Of a client's own word in an error message.
CHARS_SHOWN = 100
# Fields whose keys are the client's own words, which an error's `param` does not repeat.
FREE_KEYS = ("logit_bias", "metadata")
# Fields of several types told apart by a tag, which pydantic puts into a fault's place.
TAGGED = ("response_format", "tool_choice")


class Body(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="Accepted: no chunk is padded here.")

    @property
    def has_usage(self) -> bool:
        return bool(self.include_usage)


StopString = Annotated[str, Field(min_length=1, max_length=STOP_STRING_CHARS_MAX)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class GenerationBody(Body):
    """The fields of every endpoint that generates text. Those after `user` are no part of OpenAI's API; they are named
    as vLLM names them."""

    model: str = Field(min_length=1, max_length=256)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=CHOICES_MAX)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: Fraction | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(None, ge=1, le=TOKENS_MAX)
    stop: StopString | Annotated[list[StopString], Field(fail_fast=True, max_length=STOP_STRINGS_MAX)] | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    logit_bias: dict[TokenId, Bias] | None = Field(None, max_length=LOGIT_BIASES_MAX)
    user: str | None = Field(None, description="Accepted; nothing depends on it.")
    top_k: int | None = Field(None, ge=-1, le=TOKENS_MAX, description="Of the likeliest tokens; 0 or -1 keeps all.")
    min_p: Fraction | None = None
    # Its inverse multiplies logits: what is smaller leaves no finite numbers.
    repetition_penalty: float | None = Field(None, ge=0.01, le=10, allow_inf_nan=False)
    min_tokens: int | None = Field(None, ge=0, le=TOKENS_MAX)
    ignore_eos: bool | None = None

    @property
    def choice_count(self) -> int:
        return self.n or 1

    @property
    def has_usage_chunk(self) -> bool:
        return self.stream_options is not None and self.stream_options.has_usage

    def check(self) -> None:
        """Raises RequestInvalid for what the types alone cannot tell."""
        if self.stream_options is not None and not self.stream:
            raise RequestInvalid("stream_options is allowed only with stream=true", param="stream_options")

    def sampling(self, *, max_tokens: int | None, logprobs: int | None, grammar: Grammar | None) -> Sampling:
        """Of the first choice. Raises RequestInvalid where min_tokens is more than max_tokens."""
        if max_tokens is not None and (self.min_tokens or 0) > max_tokens:
            raise RequestInvalid(f"min_tokens {self.min_tokens} exceeds max_tokens {max_tokens}", param="min_tokens")
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            max_tokens=max_tokens,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            ignore_eos=bool(self.ignore_eos),
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            logit_bias=tuple((int(token_id), bias) for token_id, bias in (self.logit_bias or {}).items()),
            min_tokens=self.min_tokens or 0,
            logprobs=logprobs,
            grammar=grammar,
        )


BodyType = TypeVar("BodyType", bound=Body)


def parse(kind: type[BodyType], data: bytes, not_served: Mapping[str, tuple[Any, ...]]) -> BodyType:
    """The request in a JSON body. not_served: documented fields that cannot be honoured, each with the values that ask
    for nothing, beside null. Raises RequestInvalid that names the field and what is wrong with it."""
    try:
        request = kind.model_validate_json(data)
    except ValidationError as exc:
        fault = exc.errors(include_url=False, include_input=False)[0]
        if fault["type"] == "json_invalid":
            raise RequestInvalid(f"the body is no JSON: {fault['ctx']['error']}", code="invalid_json") from exc
        param = _path(fault["loc"])
        if param == "stop":
            raise _stop_fault(from_json(data)["stop"]) from exc
        if param == "logit_bias" and fault["type"] == "string_pattern_mismatch":
            raise RequestInvalid("logit_bias: its keys are token ids, of at most 9 digits", param=param) from exc
        message = f"{param}: {fault['msg']}" if param else f"the body must be a JSON object: {fault['msg']}"
        raise RequestInvalid(message, param=param or None) from exc
    for field, value in (request.model_extra or {}).items():
        if field in not_served and value is not None and value not in not_served[field]:
            raise RequestInvalid(f"{field} is not served by this version", param=field, code="unsupported_parameter")
    return request


def json_word(value: object) -> str:
    """What JSON calls it. A text is not repeated: it is the client's own."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int():
            return "a number"
        case float():
            return "a number with a fraction"
        case str():
            return "a text"
        case list():
            return "a list"
        case _:
            return "an object"


def _stop_fault(value: object) -> RequestInvalid:
    """Why this says nowhere to stop. Pydantic tells of a union only that it is not the first of its types."""
    is_list = isinstance(value, list)
    texts = value if isinstance(value, list) else [value]
    if len(texts) > STOP_STRINGS_MAX:
        fault = f"stop has {len(texts)} texts, and may have at most {STOP_STRINGS_MAX}"
        return RequestInvalid(fault, param="stop")
    for index, text in enumerate(texts):
        param = f"stop[{index}]" if is_list else "stop"
        if not isinstance(text, str):
            form = "a text" if is_list else f"a text, or a list of at most {STOP_STRINGS_MAX}"
            return RequestInvalid(f"{param} is {json_word(text)}, and should be {form}", param=param)
        if not 1 <= len(text) <= STOP_STRING_CHARS_MAX:
            fault = f"{param} has {len(text)} characters, and should have 1 to {STOP_STRING_CHARS_MAX}"
            return RequestInvalid(fault, param=param)
    return RequestInvalid(f"stop should be a text, or a list of at most {STOP_STRINGS_MAX}", param="stop")


def _path(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") → "messages[0].role"; the names pydantic adds for members of a union are left out: those
    of types, which no field is called by, and of models, which begin with a capital."""
    path = ""
    is_tag_seen = False
    for part in location:
        if path in FREE_KEYS:
            break
        if path in TAGGED and not is_tag_seen and isinstance(part, str) and part.isidentifier():
            is_tag_seen = True
            continue
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and not part[0].isupper() and part not in ("str", "int", "constrained"):
            path += f".{part}" if path else part
    return path
