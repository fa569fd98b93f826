"""The body of POST /v1/completions, and what it becomes inside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from nodes.api.answering import Asked
from nodes.api.constraints import CONSTRAINT_FAULTS, ConstraintFields, constraint_of
from nodes.api.schema import TOKENS_MAX, VLLM_NOT_SERVED, GenerationBody, parse
from nodes.api.texts_or_ids import texts_or_ids_fault
from nodes.generation import GenerateRequest, RequestInvalid

PROMPTS_MAX = 64
ANSWERS_MAX = 64  # prompts x n: each is a generation of its own
PROMPT_IDS_MAX = 2**20  # more than the context of any model
LOGPROBS_MAX = 5  # as OpenAI's API
MAX_TOKENS_DEFAULT = 16  # as OpenAI's API, which differs here from chat completions

NOT_SERVED: dict[str, tuple[Any, ...]] = VLLM_NOT_SERVED | {"add_special_tokens": (True,), "suffix": ("",)}

PromptId = Annotated[int, Field(ge=0, le=TOKENS_MAX)]
PromptIds = Annotated[list[PromptId], Field(fail_fast=True, min_length=1, max_length=PROMPT_IDS_MAX)]
Prompt = (
    str
    | PromptIds
    | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=PROMPTS_MAX)]
    | Annotated[list[PromptIds], Field(fail_fast=True, min_length=1, max_length=PROMPTS_MAX)]
)


class CompletionRequest(GenerationBody, ConstraintFields):
    prompt: Prompt
    best_of: Literal[1] | None = Field(None, description="Only 1 is served: of several answers all are given, with n.")
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=LOGPROBS_MAX)

    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        match self.prompt:
            case str():
                return (self.prompt,)
            case [int(), *_]:
                return (tuple(_ids(self.prompt)),)
            case _:
                return tuple(item if isinstance(item, str) else tuple(_ids(item)) for item in self.prompt)

    def ask(self, request_id: str, deadline_s: float, entry_node: str) -> Asked:
        """Raises RequestInvalid for what the types alone cannot tell."""
        self.check()
        prompts = self.prompts()
        count = len(prompts) * self.choice_count
        if count > ANSWERS_MAX:
            raise RequestInvalid(f"prompts x n is {count}, the limit is {ANSWERS_MAX}", param="n")
        if self.echo and not all(isinstance(prompt, str) for prompt in prompts):
            raise RequestInvalid("echo of token ids is not served: send the prompt as text", param="echo")
        if self.echo and self.logprobs is not None:
            raise RequestInvalid("logprobs of an echoed prompt are not served: leave one of both out", param="logprobs")
        constraint = constraint_of(self)
        sampling = self.sampling(
            max_tokens=self.max_tokens or MAX_TOKENS_DEFAULT,
            logprobs=self.logprobs,
            grammar=constraint.grammar if constraint else None,
        )
        generations = tuple(
            GenerateRequest(
                request_id=request_id,
                model=self.model,
                messages=(),
                sampling=replace(sampling, choice=choice),
                deadline_s=deadline_s,
                entry_node=entry_node,
                prompt=prompt,
            )
            for prompt in prompts
            for choice in range(self.choice_count)
        )
        return Asked(
            self.model,
            generations,
            choices_per_prompt=self.choice_count,
            grammar_param=constraint.param if constraint else "",
            is_stream=bool(self.stream),
            has_usage_chunk=self.has_usage_chunk,
        )


def _ids(items: Any) -> Iterator[int]:
    for item in items:
        assert isinstance(item, int), "a prompt of ids alone, as its type says"
        yield item


def parse_completion(data: bytes) -> CompletionRequest:
    """Raises RequestInvalid that names the field and what is wrong with it."""
    return parse(CompletionRequest, data, NOT_SERVED, CONSTRAINT_FAULTS | {"prompt": _prompt_fault})


def _prompt_fault(value: object) -> RequestInvalid:
    return texts_or_ids_fault(value, "prompt", count_max=PROMPTS_MAX, ids_max=PROMPT_IDS_MAX)
