"""How a request for embeddings travels between nodes, and its answer: msgpack, with vectors as little-endian float32.

A request is told apart from others on a peer link by what it begins with. Its errors are those of generations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np

from nodes.embedding import Embeddings, EmbedRequest
from nodes.generation import PRIORITY_DEFAULT, GenerationFailed, RequestInvalid
from nodes.generation_codec import decode_trace, encode_trace

# No msgpack container begins so; generation requests are one.
_PREFIX = b"embed "
# Raised when a field is added that must not be ignored.
REQUEST_VERSION = 1
# Of vectors in one event of a link, whose limit is 4 MiB.
VECTOR_BYTES = 1024 * 1024
# Of one answer: more than any piece of a request gets (nodes.embedding_dispatch).
ANSWER_BYTES_MAX = 64 * 1024 * 1024


def is_embedding(request: bytes) -> bool:
    return request.startswith(_PREFIX)


def encode_request(request: EmbedRequest) -> bytes:
    packed: bytes = msgpack.packb(
        {
            "version": REQUEST_VERSION,
            "id": request.request_id,
            "model": request.model,
            "inputs": request.inputs,
            "dimensions": request.dimensions,
            "first": request.first_index,
            "deadline_s": request.deadline_s,
            "hops": request.hops,
            "entry": request.entry_node,
            "fingerprint": request.fingerprint,
            "fairness": request.fairness_id,
            "priority": request.priority,
            **encode_trace(request.trace),
        },
        unicode_errors="surrogatepass",  # what JSON can carry
    )
    return _PREFIX + packed


def decode_request(data: bytes) -> EmbedRequest:
    """Raises RequestInvalid when the bytes are no request, GenerationFailed for one of a later version. Unknown fields
    are ignored."""
    try:
        body: dict[str, Any] = msgpack.unpackb(data.removeprefix(_PREFIX), unicode_errors="surrogatepass")
        if int(body["version"]) > REQUEST_VERSION:
            raise GenerationFailed("this node's version is older than the request's, and may not know what it asks for")
        dimensions = body["dimensions"]
        return EmbedRequest(
            request_id=str(body["id"]),
            model=str(body["model"]),
            inputs=tuple(value if isinstance(value, str) else tuple(map(int, value)) for value in body["inputs"]),
            dimensions=None if dimensions is None else max(1, int(dimensions)),
            first_index=int(body["first"]),
            deadline_s=float(body["deadline_s"]),
            hops=int(body["hops"]),
            entry_node=str(body["entry"]),
            fingerprint=str(body["fingerprint"]),
            fairness_id=str(body["fairness"]),
            priority=int(body.get("priority", PRIORITY_DEFAULT)),
            trace=decode_trace(body),
        )
    except (msgpack.UnpackException, ValueError, KeyError, TypeError, AttributeError, OverflowError) as exc:
        raise RequestInvalid(f"undecodable request for embeddings from a peer: {type(exc).__name__}") from exc


def encode_answer(answer: Embeddings) -> Iterator[object]:
    """The events of the answer: its figures, then its vectors in pieces."""
    rows, dimensions = answer.vectors.shape
    yield [rows, dimensions, answer.prompt_tokens, answer.fingerprint]
    data = np.ascontiguousarray(answer.vectors, "<f4").tobytes()
    for start in range(0, len(data), VECTOR_BYTES):
        yield data[start : start + VECTOR_BYTES]


class AnswerReader:
    """Puts an answer together. feed() its events until is_complete."""

    def __init__(self, rows: int) -> None:
        """rows: inputs of the request."""
        self._rows = rows
        self._head: tuple[int, int, str] | None = None  # dimensions, prompt tokens, fingerprint
        self._parts: list[bytes] = []
        self._missing = 0

    @property
    def is_complete(self) -> bool:
        return self._head is not None and not self._missing

    def feed(self, event: object) -> None:
        """Raises ValueError for an event that this version cannot read."""
        if self._head is None:
            self._head = self._read_head(event)
        elif not isinstance(event, bytes) or not 0 < len(event) <= self._missing:
            raise ValueError("vectors of embeddings are bytes, as many as were announced")
        else:
            self._parts.append(event)
            self._missing -= len(event)

    def answer(self) -> Embeddings:
        assert self._head is not None, "complete"
        dimensions, prompt_tokens, fingerprint = self._head
        vectors = np.frombuffer(b"".join(self._parts), "<f4").astype(np.float32, copy=False)
        return Embeddings(vectors.reshape(self._rows, dimensions), prompt_tokens, fingerprint)

    def _read_head(self, event: object) -> tuple[int, int, str]:
        match event:
            case [int() as rows, int() as dimensions, int() as tokens, str() as fingerprint, *_]:
                self._missing = 4 * rows * dimensions
                if rows == self._rows and dimensions > 0 <= tokens and self._missing <= ANSWER_BYTES_MAX:
                    return dimensions, tokens, fingerprint
        raise ValueError("embeddings begin with their number, dimensions, tokens and fingerprint")
