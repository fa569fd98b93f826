"""What clients may send, checked: what the bodies of the OpenAI API share, as pydantic types.

A documented field that this version cannot honour is refused by name, never ignored; unknown fields are accepted,
as OpenAI's API does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nodes.api.body_faults import FieldFault, fault_of, json_word
from nodes.generation import Grammar, RequestInvalid, Sampling

STOP_STRINGS_MAX = 16
STOP_STRING_CHARS_MAX = 256
TOKENS_MAX = 2**31 - 1
CHOICES_MAX = 16  # n; each is a generation of its own
LOGIT_BIASES_MAX = 1_024
# Of a client's own word in an error message.
CHARS_SHOWN = 100


class Body(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="Accepted: no chunk is padded here.")

    @property
    def has_usage(self) -> bool:
        return bool(self.include_usage)


StopString = Annotated[str, Field(min_length=1, max_length=STOP_STRING_CHARS_MAX)]
ID_PATTERN = r"^[0-9]{1,9}$"
BIAS_MAX = 100  # either way, as OpenAI's API
TokenId = Annotated[str, Field(pattern=ID_PATTERN)]
Bias = Annotated[float, Field(ge=-BIAS_MAX, le=BIAS_MAX)]
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


# What vLLM documents beyond OpenAI's fields, that would change the answer and is not honoured, with the values that ask
# for nothing.
VLLM_NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}

BodyType = TypeVar("BodyType", bound=Body)


def parse(
    kind: type[BodyType],
    data: bytes,
    not_served: Mapping[str, tuple[Any, ...]],
    faults: dict[str, FieldFault] | None = None,
) -> BodyType:
    """The request in a JSON body. not_served: documented fields that cannot be honoured, each with the values that ask
    for nothing, beside null. faults: by field, what says why a value is none, where pydantic's words would mislead.
    Raises RequestInvalid that names the field and what is wrong with it."""
    try:
        request = kind.model_validate_json(data)
    except ValidationError as exc:
        raise fault_of(exc, data, FIELD_FAULTS | (faults or {})) from exc
    for field, value in (request.model_extra or {}).items():
        if field in not_served and value is not None and value not in not_served[field]:
            raise RequestInvalid(f"{field} is not served by this version", param=field, code="unsupported_parameter")
    return request


def _stop_fault(value: object) -> RequestInvalid:
    """Why this says nowhere to stop."""
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


def _bias_fault(value: object) -> RequestInvalid | None:
    """Why a key or a value of this biases no token; None where all of them do."""
    if not isinstance(value, dict):
        return None
    if not all(re.fullmatch(ID_PATTERN, key) for key in value):
        return RequestInvalid("logit_bias: its keys are token ids, of at most 9 digits", param="logit_bias")
    if all(type(bias) in (int, float) and abs(bias) <= BIAS_MAX for bias in value.values()):
        return None
    return RequestInvalid(
        f"logit_bias: each token's bias should be a number from -{BIAS_MAX} to {BIAS_MAX}", param="logit_bias"
    )


# Of the fields of every endpoint that generates text.
FIELD_FAULTS: dict[str, FieldFault] = {"stop": _stop_fault, "logit_bias": _bias_fault}
