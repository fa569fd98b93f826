"""POST /v1/chat/completions: one generation as OpenAI's chat completion, whole or streamed."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

import trio
from quart import Quart, Response, request

from mesh.errors import MeshError, NoCapacity
from nodes.api.accounting import Exchange, exchange_of
from nodes.api.errors import Unauthorized, api_error
from nodes.api.request_body import read_body
from nodes.api.schema import ChatCompletionRequest, parse_chat
from nodes.api.services import ApiMetrics, Services
from nodes.api.sse import DONE, HEADERS, KEEP_ALIVE, EventStreamBody, data_event
from nodes.dispatched_stream import DispatchedStream
from nodes.generation import GenerateEvent, GenerationError, RequestInvalid, Usage

# A failure within this time still gets its own status code; after it the headers are sent, so that a client sees life.
FIRST_EVENT_S = 2.0
KEEP_ALIVE_S = 5.0
NODE_HEADER = "x-ai-cluster-node"


def register(app: Quart, services: Services) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions() -> Response:
        exchange = exchange_of(request.scope)
        outcome = _Outcome(services.metrics, trio.current_time())
        exchange.on_end = outcome.count
        try:
            outcome.key_id = services.access.authorize()
            _check_content_type(request.mimetype)
            body = parse_chat(await read_body(request))
            outcome.model, outcome.is_stream = body.model, bool(body.stream)
            exchange.log_fields |= {"model": body.model, "key_id": outcome.key_id}
            stream = await services.dispatch.open(
                body.generate_request(exchange.request_id, services.deadline_s, services.node_id)
            )
            exchange.closing.append(stream)
            answer = _Answer(body, exchange, outcome)
            return await (answer.streamed(stream) if body.stream else answer.whole(stream))
        except Exception as exc:
            outcome.status = _failure_status(exc)
            raise


def _check_content_type(mimetype: str) -> None:
    """JSON alone: any web page can make a browser post other types to a node on loopback, JSON it cannot."""
    if mimetype != "application/json":
        raise RequestInvalid(
            f"the content type is {mimetype[:100] or 'missing'}; send content-type: application/json",
            code="unsupported_media_type",
            status=415,
        )


class _Outcome:
    """How one request ended, counted once when its response is over, whatever ended it."""

    def __init__(self, metrics: ApiMetrics, started: float) -> None:
        self._metrics = metrics
        self._started = started
        self.key_id = "invalid"
        self.model = "unknown"
        self.is_stream = False
        self.status = "cancelled"  # until an end is reached

    def count(self, is_complete: bool) -> None:
        status = "cancelled" if self.status == "success" and not is_complete else self.status
        self._metrics.api_key_request(self.key_id, status)
        if self.is_stream:
            self._metrics.streaming_finished(self.model, status, trio.current_time() - self._started)


class _Answer:
    """The shapes of one answer: one object, or chunks."""

    def __init__(self, body: ChatCompletionRequest, exchange: Exchange, outcome: _Outcome) -> None:
        self._exchange = exchange
        self._outcome = outcome
        self._model = body.model
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._with_usage = body.stream_options is not None and body.stream_options.include_usage

    async def whole(self, stream: DispatchedStream) -> Response:
        text: list[str] = []
        last = GenerateEvent("")
        async for event in stream:
            text.append(event.text)
            last = event
        self._finish(last, stream)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(text), "refusal": None},
            "logprobs": None,
            "finish_reason": last.finish_reason,
        }
        payload = self._object("chat.completion", [choice]) | {"usage": _usage(last.usage)}
        body = json.dumps(payload, ensure_ascii=False).encode()
        return Response(body, 200, {NODE_HEADER: stream.node_id}, content_type="application/json")

    async def streamed(self, stream: DispatchedStream) -> Response:
        """Headers go out with the first event in hand, or after FIRST_EVENT_S without one."""
        first: GenerateEvent | None = None
        with trio.move_on_after(FIRST_EVENT_S):
            first = await stream.receive()
        response = Response(None, 200, HEADERS | {NODE_HEADER: stream.node_id})
        response.response = EventStreamBody(self._events(stream, first))
        response.timeout = None
        return response

    async def _events(self, stream: DispatchedStream, event: GenerateEvent | None) -> AsyncGenerator[bytes, None]:
        """Encoded chunks. A failure after the headers is an error frame, never a silent end."""
        yield self._chunk({"role": "assistant", "content": ""})
        try:
            while event is None or event.finish_reason is None:
                if event is not None and event.text:
                    yield self._text_chunk(event.text)
                event = None
                with trio.move_on_after(KEEP_ALIVE_S):
                    event = await stream.receive()
                if event is None:
                    yield KEEP_ALIVE
        except (GenerationError, MeshError) as exc:
            self._outcome.status = _failure_status(exc)
            self._exchange.log_fields["error.message"] = str(exc)
            yield data_event(api_error(exc).body())
            return
        if event.text:
            yield self._text_chunk(event.text)
        yield self._chunk({}, event.finish_reason)
        if self._with_usage:
            yield data_event(self._object("chat.completion.chunk", []) | {"usage": _usage(event.usage)})
        self._finish(event, stream)
        yield DONE

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": None,
            "choices": choices,
        }

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        chunk = self._object("chat.completion.chunk", [choice])
        return data_event(chunk | {"usage": None} if self._with_usage else chunk)

    def _text_chunk(self, text: str) -> bytes:
        return self._chunk({"content": text})

    def _finish(self, last: GenerateEvent, stream: DispatchedStream) -> None:
        self._outcome.status = "success"
        usage = last.usage or Usage(0, 0)
        self._exchange.log_fields |= {
            "executed_by": stream.node_id,
            "finish_reason": last.finish_reason,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
        }


def _usage(usage: Usage | None) -> dict[str, Any]:
    counts = usage or Usage(0, 0)
    return {
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.completion_tokens,
        "total_tokens": counts.prompt_tokens + counts.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": counts.cached_tokens},
    }


def _failure_status(error: Exception) -> str:
    """The `status` label: rejected for what no capacity or the client's own request prevented, error for our fault."""
    is_rejected = isinstance(error, NoCapacity | RequestInvalid | Unauthorized) or api_error(error).status < 500
    return "rejected" if is_rejected else "error"
