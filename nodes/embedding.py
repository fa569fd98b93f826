"""One request for embeddings, from any side: what is asked, what comes back. Errors are nodes.generation's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from nodes.generation import BYTES_PER_TOKEN, PRIORITY_DEFAULT
from observability.trace_context import TraceContext

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """inputs: texts, or token ids that are taken as they are. dimensions: of the vectors, fewer than the model's; None
    for all. first_index: of the first input among those that the client sent, for messages. fingerprint: of the one
    model that may answer; empty for any. The other fields are as in GenerateRequest."""

    request_id: str
    model: str
    inputs: tuple[str | tuple[int, ...], ...]
    dimensions: int | None = None
    first_index: int = 0
    deadline_s: float = 600.0
    hops: int = 0
    entry_node: str = ""
    fingerprint: str = ""
    fairness_id: str = ""
    priority: int = PRIORITY_DEFAULT
    trace: TraceContext | None = None


@dataclass(frozen=True, slots=True)
class Embeddings:
    """vectors: float32 [inputs, dimensions], in the order of the inputs. prompt_tokens: of all inputs together.
    fingerprint: of the model."""

    vectors: Vectors
    prompt_tokens: int
    fingerprint: str = ""


class Embedder(Protocol):
    """Something that computes embeddings: this node's engine, or a peer."""

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """Raises RequestInvalid, NoCapacity, ModelUnknown, PeerUnavailable, DeadlineExceeded and GenerationFailed."""
        ...


def input_bytes(value: str | Sequence[int]) -> int:
    """Size of an input's text, for estimates made without a tokenizer."""
    return len(value.encode("utf-8", "surrogatepass")) if isinstance(value, str) else BYTES_PER_TOKEN * len(value)
