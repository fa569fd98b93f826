"""The way of every request that generates, whatever its endpoint: opened, read, and answered whole or as a stream."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import trio
from quart import Response

from mesh.errors import MeshError
from mesh.first_token import tokens_of
from mesh.view import GENERATION
from nodes.access.gate import Admission, Caller
from nodes.api.accounting import Exchange
from nodes.api.choices import Choices
from nodes.api.errors import api_error
from nodes.api.forced_calls import naming_the_tool
from nodes.api.limit_headers import limit_headers
from nodes.api.outcome import Outcome, total_usage, usage_object
from nodes.api.served_models import context_length_of
from nodes.api.services import Services
from nodes.api.sse import DONE, HEADERS, KEEP_ALIVE, EventStreamBody, comment, data_event
from nodes.generation import GenerateEvent, GenerateRequest, GenerationError, RequestInvalid

# A failure within this time still gets its own status code; after it the headers are sent, so that a client sees life.
FIRST_EVENT_S = 2.0
KEEP_ALIVE_S = 5.0
NODE_HEADER = "x-ai-cluster-node"
# Reserved of a key's tokens per minute for an answer whose request does not bound it.
ANSWER_TOKENS_EXPECTED = 256
FINGERPRINT_CHARS = 10  # of OpenAI's own are as many
_CONTENT_TYPE = re.compile(r"[a-z0-9.+-]{1,40}/[a-z0-9.+-]{1,60}")

JsonObject = dict[str, Any]


class AnswerForm(Protocol):
    """How an endpoint writes answers. Choices are members of `choices`, of one chunk or of the whole object."""

    id_prefix: str
    object_name: str
    chunk_name: str
    extra: JsonObject  # members of the object and of each chunk

    def opening(self) -> list[JsonObject]:
        """Choices of chunks that come before any event."""
        ...

    def chunks(self, index: int, event: GenerateEvent) -> list[JsonObject]:
        """Choices of the chunks that say what the event says. The last event's end with a finish_reason."""
        ...

    def whole(self, index: int, answer: GenerateEvent) -> JsonObject: ...


@dataclass(frozen=True, slots=True)
class Asked:
    """One request after it was checked. generations: choices_per_prompt of each prompt, one after the other.
    grammar_param: the field to name where their grammar is refused."""

    model: str
    generations: Sequence[GenerateRequest]
    choices_per_prompt: int = 1
    grammar_param: str = ""
    is_stream: bool = False
    has_usage_chunk: bool = False


def check_content_type(mimetype: str) -> None:
    """JSON alone: any web page can make a browser post other types to a node on loopback, JSON it cannot.

    Raises RequestInvalid."""
    if mimetype != "application/json":
        shown = mimetype if _CONTENT_TYPE.fullmatch(mimetype) else "missing or none"
        raise RequestInvalid(
            f"the content type is {shown}; send content-type: application/json",
            code="unsupported_media_type",
            status=415,
        )


async def open_generation(services: Services, exchange: Exchange, caller: Caller, asked: Asked) -> Choices:
    """Open all generations of a request; what is open is closed with the exchange.

    Raises what Dispatch.open does."""
    streams = []
    for generation in asked.generations:
        request = replace(generation, fairness_id=caller.fairness_id, priority=caller.priority, trace=exchange.trace)
        stream = await services.dispatch.open(request)
        exchange.closing.append(stream)
        streams.append(stream)
    return Choices(streams)


async def admit(services: Services, exchange: Exchange, caller: Caller, asked: Asked) -> Admission:
    """Let the request in, as far as its key's limits allow; it is counted until the exchange is over.

    All requests that generate come through here, after they were checked and before anything is asked of a node. Raises
    Forbidden, LimitReached, ModelUnknown, and RequestInvalid for a model that does not generate."""
    context_length = context_length_of(services, caller, asked.model, GENERATION)
    prompts = asked.generations[:: asked.choices_per_prompt]
    prompt_tokens = sum(tokens_of(prompt.text_bytes()) for prompt in prompts)
    answer_tokens = sum(
        min(context_length, generation.sampling.max_tokens or ANSWER_TOKENS_EXPECTED)
        for generation in asked.generations
    )
    admission = await services.gate.admit(
        caller, asked.model, prompt_tokens, answer_tokens, prompt_tokens_max=context_length * len(prompts)
    )
    exchange.closing.append(admission)
    return admission


async def answer(
    services: Services, exchange: Exchange, outcome: Outcome, caller: Caller, asked: Asked, form: AnswerForm
) -> Response:
    """The response, whole or as a stream of events. Raises what ends the request before a response began."""
    admission = await admit(services, exchange, caller, asked)
    try:
        choices = await open_generation(services, exchange, caller, asked)
        outcome.note_streams(choices.streams, services.node_id)
        writer = _Writer(services, exchange, outcome, asked, form, choices, admission)
        return await (writer.streamed() if asked.is_stream else writer.whole())
    except RequestInvalid as exc:
        raise _with_clients_field(exc, asked) from exc


class _Writer:
    def __init__(
        self,
        services: Services,
        exchange: Exchange,
        outcome: Outcome,
        asked: Asked,
        form: AnswerForm,
        choices: Choices,
        admission: Admission,
    ) -> None:
        self._exchange = exchange
        self._outcome = outcome
        self._asked = asked
        self._form = form
        self._choices = choices
        self._admission = admission
        self._moves_told = [0] * len(choices.streams)
        self._head = {
            "id": f"{form.id_prefix}{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": system_fingerprint(services, choices.streams[0].node_id, asked.model),
            **form.extra,
        }

    async def whole(self) -> Response:
        answers = await self._choices.collect(self._admission.generated)
        usage = self._finish(answers)
        choices = [self._form.whole(index, event) for index, event in enumerate(answers)]
        payload = self._object(self._form.object_name, choices) | {"usage": usage}
        body = json.dumps(payload, ensure_ascii=False).encode()
        return Response(body, 200, self._headers(), content_type="application/json")

    async def streamed(self) -> Response:
        """Headers go out with the first event in hand, or after FIRST_EVENT_S without one."""
        await self._choices.wait_first(FIRST_EVENT_S)
        response = Response(None, 200, HEADERS | self._headers())
        response.response = EventStreamBody(self._events(), self._choices)
        response.timeout = None
        return response

    async def _events(self) -> AsyncGenerator[bytes, None]:
        """Encoded chunks. A failure after the headers is an error frame, never a silent end."""
        for choice in self._form.opening():
            yield self._chunk(choice)
        last: dict[int, GenerateEvent] = {}
        try:
            while not self._choices.has_ended:
                item = None
                with trio.move_on_after(KEEP_ALIVE_S):
                    item = await self._choices.receive()
                for comment in self._new_moves():
                    yield comment
                if item is None:
                    yield KEEP_ALIVE
                    continue
                index, event = item
                self._admission.generated(len(event.token_ids))
                for choice in self._form.chunks(index, event):
                    yield self._chunk(choice)
                last[index] = event
        except (GenerationError, MeshError) as exc:
            failure = _with_clients_field(exc, self._asked) if isinstance(exc, RequestInvalid) else exc
            self._outcome.failed(failure)
            self._exchange.log_fields |= {"error.type": type(failure).__name__, "error.message": str(failure)}
            yield data_event(api_error(failure).body())
            return
        usage = self._finish([last[index] for index in sorted(last)])
        if self._asked.has_usage_chunk:
            yield data_event(self._object(self._form.chunk_name, []) | {"usage": usage})
        yield DONE

    def _new_moves(self) -> list[bytes]:
        """Comments that say where answers went on since the last time: for people who watch; clients ignore them."""
        found = []
        for index, stream in enumerate(self._choices.streams):
            moves = stream.moves[self._moves_told[index] :]
            found += [comment(f"{move.kind} {move.origin} {move.target} {move.reason}") for move in moves]
            self._moves_told[index] = len(stream.moves)
        return found

    def _chunk(self, choice: JsonObject) -> bytes:
        chunk = self._object(self._form.chunk_name, [choice])
        return data_event(chunk | {"usage": None} if self._asked.has_usage_chunk else chunk)

    def _object(self, name: str, choices: list[JsonObject]) -> JsonObject:
        return {"object": name, **self._head, "choices": choices}

    def _finish(self, last_events: Sequence[GenerateEvent]) -> JsonObject:
        usage = total_usage(last_events, self._asked.choices_per_prompt)
        self._admission.finished(usage.prompt_tokens, usage.completion_tokens)
        self._outcome.succeeded(usage, self._choices.node_ids, [event.finish_reason for event in last_events])
        return usage_object(usage)

    def _headers(self) -> dict[str, str]:
        self._moves_told = [len(stream.moves) for stream in self._choices.streams]  # the header has them
        return {NODE_HEADER: ", ".join(self._choices.node_ids)} | limit_headers(self._admission.remaining())


def _with_clients_field(error: RequestInvalid, asked: Asked) -> RequestInvalid:
    """Engines know a grammar by one name, whichever field it came in. A peer's word comes with its first event, this
    node's at once."""
    if error.param != "response_format" or not asked.grammar_param:
        return error
    message = naming_the_tool(str(error)) if asked.grammar_param == "tools" else str(error)
    return RequestInvalid(message, param=asked.grammar_param, code=error.code, status=error.status)


def system_fingerprint(services: Services, node_id: str, model: str) -> str | None:
    """OpenAI's short form of the model's fingerprint, as the node that generates has told it; None while unknown."""
    member = services.view().members.get(node_id)
    info = None if member is None else member.model(model)
    return f"fp_{info.fingerprint[:FINGERPRINT_CHARS]}" if info is not None and info.fingerprint else None
