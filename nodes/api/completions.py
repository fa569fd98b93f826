"""POST /v1/completions: what follows a prompt, without a conversation's form, whole or streamed."""

from __future__ import annotations

from quart import Quart, Response, request

from nodes.api.accounting import exchange_of
from nodes.api.answering import Asked, JsonObject, answer, check_content_type
from nodes.api.auth import authenticate
from nodes.api.completion_schema import CompletionRequest, parse_completion
from nodes.api.outcome import Outcome
from nodes.api.request_body import read_body
from nodes.api.services import Services
from nodes.generation import GenerateEvent, TokenLogprob


def register(app: Quart, services: Services) -> None:
    @app.post("/v1/completions")
    async def completions() -> Response:
        exchange = exchange_of(request.scope)
        outcome = Outcome(services.metrics, exchange)
        try:
            caller = await authenticate(services)
            outcome.key_id = caller.label
            check_content_type(request.mimetype)
            body = parse_completion(await read_body(request))
            outcome.note_request(body.model, bool(body.stream))
            asked = body.ask(exchange.request_id, services.deadline_s, services.node_id)
            return await answer(services, exchange, outcome, caller, asked, CompletionForm(body, asked))
        except Exception as exc:
            outcome.failed(exc)
            raise


class CompletionForm:
    """Completions and their chunks, which have the same form."""

    id_prefix = "cmpl-"
    object_name = "text_completion"
    chunk_name = "text_completion"

    def __init__(self, body: CompletionRequest, asked: Asked) -> None:
        self.extra: JsonObject = {}
        self._has_logprobs = body.logprobs is not None
        self._echoes = [str(generation.prompt) if body.echo else "" for generation in asked.generations]
        self._offsets = [0] * len(asked.generations)  # in characters, of the next token that has a logprob
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in asked.generations]  # of no chunk yet

    def opening(self) -> list[JsonObject]:
        return [self._choice(index, echo, None) for index, echo in enumerate(self._echoes) if echo]

    def chunks(self, index: int, event: GenerateEvent) -> list[JsonObject]:
        """One: the last one has text and finish_reason."""
        self._logprobs[index] += event.logprobs
        if not event.text and event.finish_reason is None:
            return []
        return [self._choice(index, event.text, event.finish_reason)]

    def whole(self, index: int, answer: GenerateEvent) -> JsonObject:
        self._logprobs[index] += answer.logprobs
        return self._choice(index, self._echoes[index] + answer.text, answer.finish_reason)

    def _choice(self, index: int, text: str, finish_reason: str | None) -> JsonObject:
        logprobs = self._take_logprobs(index) if self._has_logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _take_logprobs(self, index: int) -> JsonObject:
        rows, self._logprobs[index] = self._logprobs[index], []
        offsets = []
        for row in rows:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(row.token)
        return {
            "tokens": [row.token for row in rows],
            "token_logprobs": [row.logprob for row in rows],
            "top_logprobs": [dict((*row.top, (row.token, row.logprob))) for row in rows],
            "text_offset": offsets,
        }
