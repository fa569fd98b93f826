"""The Embedder whose vectors this node's own engines compute: texts to token ids, errors to the mesh's."""

from __future__ import annotations

from collections.abc import Mapping

import trio

from mesh.errors import ModelUnknown, NoCapacity
from nodes.embedding import Embeddings, EmbedRequest, input_bytes
from nodes.engine.embedding_engine import EmbeddingEngine
from nodes.engine.embedding_queue import IntArray
from nodes.engine.errors import (
    DeadlinePassed,
    EngineFault,
    EngineStopped,
    InputTooLong,
    PromptTooLong,
    QueueFull,
    TokenUnknown,
)
from nodes.engine.pooling import shortened
from nodes.engine.tokenizer import ENCODE_INLINE_BYTES_MAX
from nodes.generation import PRIORITY_DEFAULT, DeadlineExceeded, GenerationFailed, RequestInvalid
from nodes.local import MODEL_NAME_CHARS_SHOWN, Observer, Status
from nodes.span_ends import ending
from observability.tracing import NO_TRACING, Tracer, Value, log_fields


class LocalEmbedder:
    """Embeds on the engines of this node. engines: by model name; it may gain and lose entries at any time."""

    def __init__(
        self, engines: Mapping[str, EmbeddingEngine], *, observer: Observer | None = None, tracer: Tracer = NO_TRACING
    ) -> None:
        self._engines = engines
        self._observer = observer
        self._tracer = tracer

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """Raises ModelUnknown, RequestInvalid, NoCapacity, DeadlineExceeded and GenerationFailed. The observer is told
        of it once it is known to be valid."""
        started = trio.current_time()
        engine = self._engines.get(request.model)
        if engine is None:
            raise ModelUnknown(f"this node has no embedding model named {request.model[:MODEL_NAME_CHARS_SHOWN]!r}")
        if request.fingerprint not in ("", engine.fingerprint):
            raise GenerationFailed("the model of this node differs from the one that began the answer")
        deadline = engine.now() + request.deadline_s
        _check_dimensions(request, engine.dimensions)
        if sum(map(input_bytes, request.inputs)) > ENCODE_INLINE_BYTES_MAX:
            inputs = await trio.to_thread.run_sync(_token_ids, engine, request)
        else:
            inputs = _token_ids(engine, request)
        prompt_tokens = sum(map(len, inputs))
        record = _Record(self._observer, request, started)
        attributes: dict[str, Value] = {
            "gen_ai.request.model": request.model,
            "gen_ai.usage.input_tokens": prompt_tokens,
        }
        span = self._tracer.span("embed", request.trace, attributes)
        try:
            with ending(span):
                vectors = await engine.embed(
                    inputs,
                    deadline,
                    fairness_id=request.fairness_id,
                    weight=max(1, request.priority) / PRIORITY_DEFAULT,
                )
            record.status, record.prompt_tokens = "success", prompt_tokens
        except QueueFull as exc:
            record.status = "rejected"
            raise NoCapacity(str(exc), exc.retry_after_s) from exc
        except DeadlinePassed as exc:
            record.status = "error"
            raise DeadlineExceeded(str(exc)) from exc
        except (EngineFault, EngineStopped) as exc:
            record.status = "error"
            raise GenerationFailed(str(exc)) from exc
        finally:
            record.end()
        if request.dimensions is not None:
            vectors = shortened(vectors, request.dimensions)
        return Embeddings(vectors, prompt_tokens, engine.fingerprint)


class _Record:
    """Tells the observer that one request started, and how it ended: cancelled, unless something else is known."""

    def __init__(self, observer: Observer | None, request: EmbedRequest, started: float) -> None:
        self.status: Status = "cancelled"
        self.prompt_tokens = 0
        self._observer = observer
        self._model = request.model
        self._labels = {"request_id": request.request_id, **log_fields(request.trace)}
        self._started = started
        if observer is not None:
            observer.started(request.model)

    def end(self) -> None:
        if self._observer is not None:
            seconds = trio.current_time() - self._started
            self._observer.finished(self._model, self.status, seconds, self.prompt_tokens, 0, self._labels, None)


def _check_dimensions(request: EmbedRequest, dimensions: int) -> None:
    if request.dimensions is not None and request.dimensions > dimensions:
        message = f"dimensions is {request.dimensions}, and the vectors of this model have {dimensions}"
        raise RequestInvalid(message, param="dimensions")


def _token_ids(engine: EmbeddingEngine, request: EmbedRequest) -> list[IntArray]:
    """Raises RequestInvalid."""
    checked: list[IntArray] = []
    for index, value in enumerate(request.inputs, request.first_index):
        try:
            ids = engine.model.encode(value) if isinstance(value, str) else value
            if not ids:
                raise RequestInvalid(f"input {index} is empty", param="input")
            checked += engine.checked([ids])
        except PromptTooLong as exc:
            error = InputTooLong(exc.tokens, exc.limit, is_exact=False)
            raise _too_long(index, error) from exc
        except InputTooLong as exc:
            raise _too_long(index, exc) from exc
        except TokenUnknown as exc:
            raise RequestInvalid(f"input {index}: {exc}", param="input") from exc
    return checked


def _too_long(index: int, error: InputTooLong) -> RequestInvalid:
    return RequestInvalid(f"input {index}: {error}", param="input", code="context_length_exceeded")
