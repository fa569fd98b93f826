"""How a generation travels between nodes: its request, its events and its errors, as msgpack."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import msgpack

from nodes.generation import (
    PRIORITY_DEFAULT,
    DeadlineExceeded,
    GenerateEvent,
    GenerateRequest,
    GenerationError,
    GenerationFailed,
    GenerationMoved,
    Grammar,
    RequestInvalid,
    Sampling,
    TokenLogprob,
    Usage,
)
from observability.trace_context import TraceContext, parse_trace_context

# A request travels in one frame of a peer link; the HTTP body limit is below it.
REQUEST_BYTES_MAX = 8 * 1024 * 1024
# Raised when a field is added that must not be ignored: a node refuses what was encoded by a later version. A request
# is marked with the lowest version that has all it needs, so nodes of different versions share what both know.
REQUEST_VERSION = 2
VERSION_OF_MESSAGES = 1  # messages of role and content alone
VERSION_OF_TOOLS_AND_PROMPTS = 2

# Words for errors on a peer link.
CODE_INVALID = "invalid"
CODE_DEADLINE = "deadline"
CODE_FAILED = "failed"
CODE_MOVED = "moved"


def encode_request(request: GenerateRequest) -> bytes:
    sampling = request.sampling
    body = {
        "version": _version_needed(request),
        "id": request.request_id,
        "model": request.model,
        "messages": [dict(message) for message in request.messages],
        "sampling": _present(sampling),
        "deadline_s": request.deadline_s,
        "hops": request.hops,
        "entry": request.entry_node,
        "noise": request.noise_seed,
        "ids": list(request.generated_ids),
        "fingerprint": request.fingerprint,
        "fairness": request.fairness_id,
    }
    if request.priority != PRIORITY_DEFAULT:
        body["priority"] = request.priority
    if request.tools:
        body["tools"] = request.tools
    if request.prompt is not None:
        body["prompt"] = request.prompt
    body |= encode_trace(request.trace)
    encoded: bytes = msgpack.packb(body)
    return encoded


def encode_trace(trace: TraceContext | None) -> dict[str, str]:
    """Fields of a request, which may be ignored."""
    if trace is None:
        return {}
    return {"traceparent": trace.traceparent} | ({"tracestate": trace.state} if trace.state else {})


def decode_trace(body: Mapping[str, Any]) -> TraceContext | None:
    """None where the fields are missing or cannot be read."""
    parent = body.get("traceparent")
    return None if parent is None else parse_trace_context(str(parent), str(body.get("tracestate", "")))


def _version_needed(request: GenerateRequest) -> int:
    if request.tools or request.prompt is not None or any("tool_calls" in message for message in request.messages):
        return VERSION_OF_TOOLS_AND_PROMPTS
    return VERSION_OF_MESSAGES


def _present(sampling: Sampling) -> dict[str, Any]:
    """The fields that differ from their defaults; most requests have two or three."""
    found: dict[str, Any] = {}
    for name, default in _SAMPLING_DEFAULTS.items():
        value = getattr(sampling, name)
        if value != default:
            found[name] = value
    if sampling.grammar is not None:
        found["grammar"] = [sampling.grammar.kind, sampling.grammar.text]
    return found


_SAMPLING_DEFAULTS = {field.name: field.default for field in fields(Sampling)}


def decode_request(data: bytes) -> GenerateRequest:
    """Raises RequestInvalid when the bytes are no request, GenerationFailed for one of a later version. Unknown fields
    are ignored."""
    try:
        body: dict[str, Any] = msgpack.unpackb(data)
        if int(body["version"]) > REQUEST_VERSION:
            raise GenerationFailed("this node's version is older than the request's, and may not know what it asks for")
        return GenerateRequest(
            request_id=str(body["id"]),
            model=str(body["model"]),
            messages=tuple({str(k): str(v) for k, v in message.items()} for message in body["messages"]),
            sampling=_decode_sampling(body["sampling"]),
            deadline_s=float(body["deadline_s"]),
            hops=int(body["hops"]),
            entry_node=str(body["entry"]),
            noise_seed=int(body["noise"]),
            generated_ids=tuple(map(int, body["ids"])),
            fingerprint=str(body["fingerprint"]),
            fairness_id=str(body["fairness"]),
            priority=int(body.get("priority", PRIORITY_DEFAULT)),
            tools=str(body.get("tools", "")),
            prompt=_read_prompt(body.get("prompt")),
            trace=decode_trace(body),
        )
    except (msgpack.UnpackException, ValueError, KeyError, TypeError, AttributeError, OverflowError) as exc:
        raise RequestInvalid(f"undecodable generation request from a peer: {exc!r}") from exc


def _read_prompt(body: Any) -> str | tuple[int, ...] | None:
    return tuple(map(int, body)) if isinstance(body, list) else None if body is None else str(body)


def _decode_sampling(body: dict[str, Any]) -> Sampling:
    found: dict[str, Any] = {}
    for name, read in _SAMPLING_READERS.items():
        if body.get(name) is not None:
            found[name] = read(body[name])
    return Sampling(**found)


def _read_grammar(body: Any) -> Grammar:
    kind, text = body
    return Grammar(str(kind), str(text))


_SAMPLING_READERS: Mapping[str, Callable[[Any], Any]] = {
    "temperature": float,
    "top_p": float,
    "seed": int,
    "max_tokens": int,
    "stop": lambda stops: tuple(map(str, stops)),
    "ignore_eos": bool,
    "top_k": int,
    "min_p": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "repetition_penalty": float,
    "logit_bias": lambda pairs: tuple((int(token_id), float(bias)) for token_id, bias in pairs),
    "min_tokens": int,
    "logprobs": int,
    "choice": int,
    "grammar": _read_grammar,
}


def encode_event(event: GenerateEvent) -> list[Any]:
    """A plain list, packed by the link together with the other events of the same engine step."""
    encoded: list[Any] = [event.text, list(event.token_ids)]
    if event.finish_reason is not None or event.logprobs:
        usage = event.usage
        encoded.append(event.finish_reason)
        encoded.append(usage and _encode_usage(usage))
    if event.logprobs:
        encoded.append([[row.token, row.logprob, [list(pair) for pair in row.top]] for row in event.logprobs])
    return encoded


def decode_event(encoded: Any) -> GenerateEvent:
    """Raises ValueError when the fields are no event of this version."""
    try:
        text, token_ids, *rest = encoded
        if not rest:
            return GenerateEvent(str(text), tuple(map(int, token_ids)))
        reason, counts = rest[:2]
        return GenerateEvent(
            str(text),
            tuple(map(int, token_ids)),
            None if reason is None else str(reason),
            None if counts is None else _decode_usage(counts),
            tuple(map(_decode_logprob, rest[2])) if len(rest) > 2 else (),
        )
    except (TypeError, LookupError) as exc:
        raise ValueError(f"undecodable generation event: {exc!r}") from exc


def _encode_usage(usage: Usage) -> list[Any]:
    return [usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, usage.queued_s]


def _decode_usage(counts: Any) -> Usage:
    """Of a node that does not tell how long a request was queued, the last field is missing."""
    queued_s = None if len(counts) < 4 or counts[3] is None else float(counts[3])
    if queued_s is not None and not math.isfinite(queued_s):
        raise ValueError(f"undecodable generation event: queued for {queued_s} s")
    return Usage(int(counts[0]), int(counts[1]), int(counts[2]), queued_s)


def _decode_logprob(row: Any) -> TokenLogprob:
    token, logprob, top = row
    return TokenLogprob(str(token), float(logprob), tuple((str(other), float(value)) for other, value in top))


def encode_error(error: GenerationError) -> tuple[str, str]:
    """(code, message) under which a peer link carries the error to the node that asked."""
    if isinstance(error, RequestInvalid):
        return CODE_INVALID, json.dumps([str(error), error.param, error.code, error.status])
    if isinstance(error, DeadlineExceeded):
        return CODE_DEADLINE, str(error)
    if isinstance(error, GenerationMoved):
        return CODE_MOVED, str(error)
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
    if code == CODE_MOVED:
        return GenerationMoved(message)
    return GenerationFailed(message)
