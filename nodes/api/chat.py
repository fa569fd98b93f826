"""POST /v1/chat/completions: answers to a conversation, as OpenAI's chat completions, whole or streamed."""

from __future__ import annotations

import uuid

from quart import Quart, Response, request

from nodes.api.accounting import exchange_of
from nodes.api.answer_pieces import AnswerReader, CallStart, Content, Piece, PlainReader
from nodes.api.answering import Asked, JsonObject, answer, check_content_type
from nodes.api.auth import authenticate
from nodes.api.chat_schema import ChatCompletionRequest, ChatPlan, parse_chat
from nodes.api.forced_calls import ForcedCallReader
from nodes.api.outcome import Outcome
from nodes.api.request_body import read_body
from nodes.api.services import Services
from nodes.api.tool_calls import ToolCallReader
from nodes.generation import FINISH_STOP, GenerateEvent, TokenLogprob

FINISH_TOOL_CALLS = "tool_calls"


def register(app: Quart, services: Services) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions() -> Response:
        exchange = exchange_of(request.scope)
        outcome = Outcome(services.metrics, exchange)
        try:
            caller = await authenticate(services)
            outcome.key_id = caller.label
            check_content_type(request.mimetype)
            body = parse_chat(await read_body(request))
            outcome.note_request(body.model, bool(body.stream))
            plan = body.plan(exchange.request_id, services.deadline_s, services.node_id)
            asked = Asked(
                body.model,
                plan.generations,
                choices_per_prompt=body.choice_count,
                grammar_param=plan.grammar_param,
                is_stream=bool(body.stream),
                has_usage_chunk=body.has_usage_chunk,
            )
            return await answer(services, exchange, outcome, caller, asked, ChatForm(body, plan))
        except Exception as exc:
            outcome.failed(exc)
            raise


class ChatForm:
    """Chat completions and their chunks."""

    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(self, body: ChatCompletionRequest, plan: ChatPlan) -> None:
        self.extra: JsonObject = {} if body.service_tier is None else {"service_tier": "default"}
        self._has_logprobs = bool(body.logprobs)
        self._is_forced = plan.tools.is_forced
        self._choices = [_Choice(_reader(plan)) for _ in plan.generations]

    def opening(self) -> list[JsonObject]:
        delta = {"role": "assistant", "content": None if self._is_forced else ""}
        return [self._chunk(index, dict(delta)) for index in range(len(self._choices))]

    def chunks(self, index: int, event: GenerateEvent) -> list[JsonObject]:
        choice = self._choices[index]
        pieces = choice.read(event)
        found = [self._chunk(index, choice.delta(piece), choice.take_logprobs()) for piece in pieces]
        if event.finish_reason is not None:
            if choice.logprobs:
                found.append(self._chunk(index, {"content": ""}, choice.take_logprobs()))
            found.append(self._chunk(index, {}) | {"finish_reason": choice.finish_reason(event)})
        return found

    def whole(self, index: int, answer: GenerateEvent) -> JsonObject:
        choice = self._choices[index]
        texts: list[str] = []
        calls: list[JsonObject] = []
        for piece in choice.read(answer):
            match piece:
                case Content():
                    texts.append(piece.text)
                case CallStart():
                    calls += choice.delta(piece)["tool_calls"]
                    del calls[-1]["index"]
                case _:
                    calls[piece.index]["function"]["arguments"] += piece.text
        content = "".join(texts)
        message = {"role": "assistant", "content": None if calls and not content else content, "refusal": None}
        if calls:
            message["tool_calls"] = calls  # type: ignore[assignment]
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice.take_logprobs()) if self._has_logprobs else None,
            "finish_reason": choice.finish_reason(answer),
        }

    def _chunk(self, index: int, delta: JsonObject, logprobs: list[TokenLogprob] | None = None) -> JsonObject:
        told = self._logprobs(logprobs) if logprobs else None
        return {"index": index, "delta": delta, "logprobs": told, "finish_reason": None}

    def _logprobs(self, rows: list[TokenLogprob]) -> JsonObject:
        return {"content": [_logprob(row) for row in rows], "refusal": None}


class _Choice:
    """One answer while it is read. logprobs: of tokens whose chunk has not been written yet."""

    def __init__(self, reader: AnswerReader) -> None:
        self._reader = reader
        self._has_calls = False
        self.logprobs: list[TokenLogprob] = []

    def read(self, event: GenerateEvent) -> list[Piece]:
        self.logprobs += event.logprobs
        pieces = self._reader.feed(event.text)
        return pieces if event.finish_reason is None else pieces + self._reader.finish()

    def take_logprobs(self) -> list[TokenLogprob]:
        taken, self.logprobs = self.logprobs, []
        return taken

    def delta(self, piece: Piece) -> JsonObject:
        match piece:
            case Content():
                return {"content": piece.text}
            case CallStart():
                self._has_calls = True
                function = {"name": piece.name, "arguments": ""}
                call_id = f"call_{uuid.uuid4().hex[:24]}"
                return {"tool_calls": [{"index": piece.index, "id": call_id, "type": "function", "function": function}]}
        return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}

    def finish_reason(self, last: GenerateEvent) -> str | None:
        return FINISH_TOOL_CALLS if self._has_calls and last.finish_reason == FINISH_STOP else last.finish_reason


def _reader(plan: ChatPlan) -> AnswerReader:
    tools = plan.tools
    if not tools.tools:
        return PlainReader()
    if tools.is_forced or plan.is_json_or_calls:
        return ForcedCallReader(may_be_content=not tools.is_forced)
    return ToolCallReader(tools.names, is_single=tools.is_single)


def _logprob(row: TokenLogprob) -> JsonObject:
    top = [{"token": token, "logprob": value, "bytes": _bytes(token)} for token, value in row.top]
    return {"token": row.token, "logprob": row.logprob, "bytes": _bytes(row.token), "top_logprobs": top}


def _bytes(token: str) -> list[int] | None:
    """None where the token is a part of a character, whose bytes its text does not tell."""
    return None if "\N{REPLACEMENT CHARACTER}" in token else list(token.encode("utf-8", "replace"))
