"""One generation, from any side: what is asked, what comes back, and the codec that carries both between nodes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgpack
import trio

# A request travels in one frame of a peer link; the HTTP body limit is below it.
REQUEST_BYTES_MAX = 8 * 1024 * 1024

FINISH_STOP = "stop"
FINISH_LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose tokens. temperature 0 is greedy.

    None leaves it to the node that executes: temperature and top_p as the model folder says, a seed drawn at random.
    """

    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None  # None: what is left of the context
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """What to generate. messages: OpenAI chat messages with text content.

    deadline_s: seconds left, counted from when it is opened."""

    request_id: str
    model: str
    messages: tuple[Mapping[str, str], ...]
    sampling: Sampling = field(default_factory=Sampling)
    deadline_s: float = 600.0
    hops: int = 0  # how many nodes have forwarded it; one is the limit
    entry_node: str = ""

    def text_bytes(self) -> int:
        """Size of the prompt's text, for estimates made without a tokenizer."""
        return sum(len(message["content"].encode("utf-8", "surrogatepass")) for message in self.messages)


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one generation."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class GenerateEvent:
    """Some tokens and the text they complete; the last event alone has finish_reason and usage.

    text may be empty while a character or a possible stop string is incomplete."""

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None

    def merged_with(self, later: GenerateEvent) -> GenerateEvent:
        """One event that says what both say. later: the one that came next."""
        return GenerateEvent(self.text + later.text, self.token_ids + later.token_ids, later.finish_reason, later.usage)


class GenerationError(Exception):
    """Root of what opening or reading a generation raises."""


class RequestInvalid(GenerationError):
    """The client's fault: answered 4xx. param: the field at fault, code: OpenAI's machine-readable word for it."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


class GenerationFailed(GenerationError):
    """Our fault: the engine or the node that executed broke after the stream had begun, or no node could serve it."""


class DeadlineExceeded(GenerationError):
    """The request's deadline passed before the generation ended."""


class Generator(Protocol):
    """Something that generates: this node's engine, or a peer.

    The stream returned ends after the event with a finish_reason; a read may raise GenerationError or PeerUnavailable.
    Closing it cancels."""

    async def open(self, request: GenerateRequest) -> trio.abc.ReceiveChannel[GenerateEvent]:
        """May wait for a connection, never for a token.

        Raises RequestInvalid, NoCapacity, ModelUnknown, PeerUnavailable."""
        ...


def encode_request(request: GenerateRequest) -> bytes:
    sampling = request.sampling
    body = {
        "id": request.request_id,
        "model": request.model,
        "messages": [dict(message) for message in request.messages],
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "max_tokens": sampling.max_tokens,
        "stop": list(sampling.stop),
        "ignore_eos": sampling.ignore_eos,
        "deadline_s": request.deadline_s,
        "hops": request.hops,
        "entry": request.entry_node,
    }
    encoded: bytes = msgpack.packb(body)
    return encoded


def decode_request(data: bytes) -> GenerateRequest:
    """Raises RequestInvalid when the bytes are no request of this version. Unknown fields are ignored."""
    try:
        body: dict[str, Any] = msgpack.unpackb(data)
        return GenerateRequest(
            request_id=str(body["id"]),
            model=str(body["model"]),
            messages=tuple({str(k): str(v) for k, v in message.items()} for message in body["messages"]),
            sampling=Sampling(
                temperature=None if body["temperature"] is None else float(body["temperature"]),
                top_p=None if body["top_p"] is None else float(body["top_p"]),
                seed=None if body["seed"] is None else int(body["seed"]),
                max_tokens=None if body["max_tokens"] is None else int(body["max_tokens"]),
                stop=tuple(str(s) for s in body["stop"]),
                ignore_eos=bool(body.get("ignore_eos", False)),
            ),
            deadline_s=float(body["deadline_s"]),
            hops=int(body["hops"]),
            entry_node=str(body["entry"]),
        )
    except (msgpack.UnpackException, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise RequestInvalid(f"undecodable generation request from a peer: {exc!r}") from exc


def encode_event(event: GenerateEvent) -> list[Any]:
    """A plain list, packed by the link together with the other events of the same engine step."""
    if event.finish_reason is None:
        return [event.text, list(event.token_ids)]
    usage = event.usage or Usage(0, 0)
    counts = [usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens]
    return [event.text, list(event.token_ids), event.finish_reason, counts]


def decode_event(fields: Any) -> GenerateEvent:
    """Raises ValueError when the fields are no event of this version."""
    try:
        text, token_ids, *rest = fields
        if not rest:
            return GenerateEvent(str(text), tuple(int(t) for t in token_ids))
        counts = rest[1]
        return GenerateEvent(
            str(text),
            tuple(int(t) for t in token_ids),
            str(rest[0]),
            Usage(int(counts[0]), int(counts[1]), int(counts[2])),
        )
    except (TypeError, IndexError) as exc:
        raise ValueError(f"undecodable generation event: {exc!r}") from exc


# Words for errors on a peer link.
CODE_INVALID = "invalid"
CODE_DEADLINE = "deadline"
CODE_FAILED = "failed"


def encode_error(error: GenerationError) -> tuple[str, str]:
    """(code, message) under which a peer link carries the error to the node that asked."""
    if isinstance(error, RequestInvalid):
        return CODE_INVALID, json.dumps([str(error), error.param, error.code, error.status])
    if isinstance(error, DeadlineExceeded):
        return CODE_DEADLINE, str(error)
    return CODE_FAILED, str(error)


def decode_error(code: str, message: str) -> GenerationError:
    """The error that encode_error was given; GenerationFailed for a code this version does not know."""
    if code == CODE_INVALID:
        try:
            text, param, word, status = json.loads(message)
            return RequestInvalid(str(text), param=param, code=word, status=int(status))
        except (ValueError, TypeError):
            return GenerationFailed("a peer refused the request in a form this version cannot read")
    if code == CODE_DEADLINE:
        return DeadlineExceeded(message)
    return GenerationFailed(message)
