"""POST /v1/embeddings: a vector for each text."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Literal

import trio
from quart import Quart, Response, request

from mesh.first_token import tokens_of
from mesh.view import EMBEDDING
from nodes.api.accounting import exchange_of
from nodes.api.answering import NODE_HEADER, check_content_type
from nodes.api.auth import authenticate
from nodes.api.embedding_schema import parse_embedding
from nodes.api.limit_headers import limit_headers
from nodes.api.outcome import Outcome
from nodes.api.request_body import read_body
from nodes.api.served_models import context_length_of
from nodes.api.services import Services
from nodes.embedding import Vectors, input_bytes
from nodes.embedding_dispatch import Embedded
from nodes.generation import Usage

Encoding = Literal["float", "base64"]

# Above so many numbers writing them takes longer than an event loop should wait (1 us each); a worker thread does it.
WRITE_INLINE_NUMBERS_MAX = 8 * 1024


def register(app: Quart, services: Services) -> None:
    @app.post("/v1/embeddings")
    async def embeddings() -> Response:
        exchange = exchange_of(request.scope)
        outcome = Outcome(services.metrics, exchange)
        try:
            caller = await authenticate(services)
            outcome.key_id = caller.label
            check_content_type(request.mimetype)
            body = parse_embedding(await read_body(request))
            outcome.note_request(body.model, False)
            asked = body.ask(exchange.request_id, services.deadline_s, services.node_id)
            context_length = context_length_of(services, caller, body.model, EMBEDDING)
            expected = sum(tokens_of(input_bytes(value)) for value in asked.inputs)
            expected_max = context_length * len(asked.inputs)
            admission = await services.gate.admit(caller, body.model, expected, 0, prompt_tokens_max=expected_max)
            exchange.closing.append(admission)
            embedded = await services.embeddings.embed(
                replace(asked, fairness_id=caller.fairness_id, priority=caller.priority, trace=exchange.trace)
            )
            admission.finished(embedded.prompt_tokens, 0)
            outcome.succeeded(Usage(embedded.prompt_tokens, 0), embedded.node_ids, ())
            content = await _write(body.model, embedded, body.encoding_format or "float")
            headers = {NODE_HEADER: ", ".join(embedded.node_ids)} | limit_headers(admission.remaining())
            return Response(content, 200, headers, content_type="application/json")
        except Exception as exc:
            outcome.failed(exc)
            raise


async def _write(model: str, embedded: Embedded, encoding: Encoding) -> bytes:
    if embedded.vectors.size <= WRITE_INLINE_NUMBERS_MAX:
        return _json(model, embedded, encoding)
    return await trio.to_thread.run_sync(_json, model, embedded, encoding)


def _json(model: str, embedded: Embedded, encoding: Encoding) -> bytes:
    answer = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": embedding}
            for index, embedding in enumerate(_encoded(embedded.vectors, encoding))
        ],
        "model": model,
        "usage": {"prompt_tokens": embedded.prompt_tokens, "total_tokens": embedded.prompt_tokens},
    }
    return json.dumps(answer, ensure_ascii=False).encode()


def _encoded(vectors: Vectors, encoding: Encoding) -> list[list[float]] | list[str]:
    if encoding == "float":
        numbers: list[list[float]] = vectors.tolist()
        return numbers
    return [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
