"""The body of POST /v1/embeddings, and what it becomes inside."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from nodes.api.schema import TOKENS_MAX, Body, parse
from nodes.api.texts_or_ids import texts_or_ids_fault
from nodes.embedding import EmbedRequest
from nodes.generation import RequestInvalid

# As OpenAI's API.
INPUTS_MAX = 2_048
INPUT_IDS_TOTAL_MAX = 300_000
DIMENSIONS_MAX = 2**16  # more than any model has

InputId = Annotated[int, Field(ge=0, le=TOKENS_MAX)]
InputIds = Annotated[list[InputId], Field(fail_fast=True, min_length=1, max_length=INPUT_IDS_TOTAL_MAX)]
Input = (
    str
    | InputIds
    | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=INPUTS_MAX)]
    | Annotated[list[InputIds], Field(fail_fast=True, min_length=1, max_length=INPUTS_MAX)]
)


class EmbeddingRequest(Body):
    model: str = Field(min_length=1, max_length=256)
    input: Input
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: of little-endian 32-bit floats. Default float."
    )
    dimensions: int | None = Field(
        None, ge=1, le=DIMENSIONS_MAX, description="Only the first so many, scaled to length 1; not above the model's."
    )
    user: str | None = Field(None, description="Accepted; nothing depends on it.")

    def inputs(self) -> tuple[str | tuple[int, ...], ...]:
        """Raises RequestInvalid for an empty text, and for more token ids than OpenAI's API takes."""
        found: tuple[str | tuple[int, ...], ...]
        match self.input:
            case str():
                found = (self.input,)
            case [int(), *_]:
                found = (tuple(value for value in self.input if isinstance(value, int)),)
            case _:
                found = tuple(
                    value if isinstance(value, str) else tuple(value)
                    for value in self.input
                    if not isinstance(value, int)
                )
        for index, value in enumerate(found):
            if not value:
                raise RequestInvalid(f"input {index} is empty", param="input")
        total = sum(len(value) for value in found if not isinstance(value, str))
        if total > INPUT_IDS_TOTAL_MAX:
            raise RequestInvalid(f"input has {total} token ids, the limit is {INPUT_IDS_TOTAL_MAX}", param="input")
        return found

    def ask(self, request_id: str, deadline_s: float, entry_node: str) -> EmbedRequest:
        """Raises RequestInvalid for what the types alone cannot tell."""
        return EmbedRequest(
            request_id=request_id,
            model=self.model,
            inputs=self.inputs(),
            dimensions=self.dimensions,
            deadline_s=deadline_s,
            entry_node=entry_node,
        )


NOT_SERVED: dict[str, tuple[Any, ...]] = {}


def parse_embedding(data: bytes) -> EmbeddingRequest:
    """Raises RequestInvalid that names the field and what is wrong with it."""
    return parse(EmbeddingRequest, data, NOT_SERVED, {"input": _input_fault})


def _input_fault(value: object) -> RequestInvalid:
    return texts_or_ids_fault(value, "input", count_max=INPUTS_MAX, ids_max=INPUT_IDS_TOTAL_MAX)
