"""The body of POST /v1/embeddings, and what it becomes inside."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeGuard

from pydantic import Field
from pydantic_core import from_json

from nodes.api.schema import TOKENS_MAX, Body, json_word, parse
from nodes.embedding import EmbedRequest
from nodes.generation import RequestInvalid

# As OpenAI's API.
INPUTS_MAX = 2_048
INPUT_IDS_TOTAL_MAX = 300_000
DIMENSIONS_MAX = 2**16  # more than any model has

FORMS = "a text, a list of texts, a list of token ids or a list of such lists"

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
    try:
        return parse(EmbeddingRequest, data, NOT_SERVED)
    except RequestInvalid as exc:
        if exc.param != "input":
            raise
        body = from_json(data)
        if "input" not in body:
            raise
        raise _input_fault(body["input"]) from exc


def _input_fault(value: object) -> RequestInvalid:
    """Why this is no input. Pydantic tells of a union only that it is not the first of its types."""
    if not isinstance(value, list):
        return _fault("input", f"is {json_word(value)}, and should be {FORMS}")
    if not value:
        return _fault("input", "is an empty list; give at least one text")
    first = value[0]
    if _is_int(first):
        return _ids_fault("input", value) or _fault("input", f"should be {FORMS}")
    if not isinstance(first, str | list):
        return _fault("input[0]", f"is {json_word(first)}, and should be a text, a token id or a list of token ids")
    if len(value) > INPUTS_MAX:
        return _fault("input", f"has {len(value)} inputs, and may have at most {INPUTS_MAX} inputs")
    for index, part in enumerate(value):
        if type(part) is not type(first):
            kind = "a text" if isinstance(first, str) else "a list of token ids"
            return _fault(f"input[{index}]", f"is {json_word(part)}, and should be {kind} as input[0] is")
        if isinstance(part, list):
            fault = _ids_fault(f"input[{index}]", part)
            if fault is not None:
                return fault
    return _fault("input", f"should be {FORMS}")


def _ids_fault(path: str, ids: list[object]) -> RequestInvalid | None:
    if not ids:
        return _fault(path, "is empty; give at least one token id")
    if len(ids) > INPUT_IDS_TOTAL_MAX:
        return _fault(path, f"has {len(ids)} token ids, the limit is {INPUT_IDS_TOTAL_MAX}")
    for index, token_id in enumerate(ids):
        if not _is_int(token_id):
            return _fault(f"{path}[{index}]", f"is {json_word(token_id)}, and should be a token id, a whole number")
        if not 0 <= token_id <= TOKENS_MAX:
            return _fault(f"{path}[{index}]", f"is no token id: they are 0 to {TOKENS_MAX}")
    return None


def _fault(path: str, text: str) -> RequestInvalid:
    return RequestInvalid(f"{path} {text}", param=path)


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
