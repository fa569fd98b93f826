"""What every answer tells browsers: nothing is guessed, framed or kept, and no web page reads it but those configured.

An ASGI layer inside the accounting, so that it sees errors too and what it answers itself is counted: also what has to
be refused before the application sees it, such as a request with two ends, or a host that can be none. Cross-origin
requests (Fetch standard, CORS): without configured origins no answer allows any, and preflights are refused as any
method is that a route does not have. With them, /v1 alone is opened, and without credentials: a page sends its API key
itself. /admin never is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from werkzeug.exceptions import HTTPException

from nodes.api.accounting import exchange_of
from nodes.api.errors import api_error
from nodes.strict_headers import HEAD_BYTES_MAX, SAME_ORIGIN, STRICT

HEADERS_MAX = 100  # of one request; clients of the API send some ten
HEADER_LINE_BYTES = 4  # around a name and a value
PREFLIGHT_AGE_S = 600
EXPOSED = (
    b"x-request-id, openai-processing-ms, retry-after, retry-after-ms, x-ai-cluster-node, x-ratelimit-limit-requests, "
    b"x-ratelimit-remaining-requests, x-ratelimit-reset-requests, x-ratelimit-limit-tokens, "
    b"x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)
OPEN_PATHS = "/v1/"
METHODS = b"GET, POST"
_HEADER_LIST = re.compile(rb"[A-Za-z0-9-]{1,64}(?: *, *[A-Za-z0-9-]{1,64}){0,63}")

_TOO_MANY = (
    b'{"error": {"message": "more than %d headers, or %d bytes of request line and headers", '
    b'"type": "invalid_request_error", "param": null, "code": "request_header_fields_too_large"}}'
    % (HEADERS_MAX, HEAD_BYTES_MAX)
)
_TWO_ENDS = (
    b'{"error": {"message": "the request has both content-length and transfer-encoding", '
    b'"type": "invalid_request_error", "param": null, "code": "bad_request"}}'
)
_NO_WEBSOCKET = (
    b'{"error": {"message": "there are no websockets here; POST /v1/chat/completions streams with stream=true", '
    b'"type": "invalid_request_error", "param": null, "code": "forbidden"}}'
)
_NO_PATH = (
    b'{"error": {"message": "the request\'s target has no path", "type": "invalid_request_error", "param": null, '
    b'"code": "bad_request"}}'
)


class ResponseHeaders:
    """Wraps an ASGI application. origins: of configuration; "*" is every one."""

    def __init__(self, app: Any, origins: Sequence[str]) -> None:
        self._app = app
        self._origins = frozenset(origin.encode() for origin in origins)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        allowed = self._allowed(scope)

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_missing(message.get("headers", ()), allowed)]
            await send(message)

        if len(scope["headers"]) > HEADERS_MAX or _head_bytes(scope) > HEAD_BYTES_MAX:
            await _answer(with_headers, 431, [(b"content-type", b"application/json")], _TOO_MANY)
        elif _header(scope, b"transfer-encoding") and _header(scope, b"content-length"):
            # What is before this node may have read it by the other one (RFC 9112, 6.1).
            await _answer(
                with_headers, 400, [(b"content-type", b"application/json"), (b"connection", b"close")], _TWO_ENDS
            )
        elif scope["method"] == "GET" and _header(scope, b"upgrade").lower() == b"websocket":
            await _answer(with_headers, 403, [(b"content-type", b"application/json")], _NO_WEBSOCKET)
        elif not _has_path(scope["path"]):
            await _answer(with_headers, 400, [(b"content-type", b"application/json")], _NO_PATH)
        elif allowed and scope["method"] == "OPTIONS" and _header(scope, b"access-control-request-method"):
            exchange_of(scope).route = "preflight"
            await _answer(with_headers, 204, _preflight(scope))
        else:
            await self._answered(scope, receive, with_headers)

    async def _answered(self, scope: Any, receive: Any, send: Any) -> None:
        """By the application; what it refuses before its own error handlers, such as a host that can be none, here."""
        refusal: HTTPException | None = None
        try:
            await self._app(scope, receive, send)
        except* HTTPException as group:
            refusal = _first(group)
        if refusal is not None:
            error = api_error(refusal)
            await _answer(
                send, error.status, [(b"content-type", b"application/json")], json.dumps(error.body()).encode()
            )

    def _allowed(self, scope: Any) -> bytes:
        """The origin that may read the answer; empty for none."""
        if not self._origins or not scope["path"].startswith(OPEN_PATHS):
            return b""
        origin = _header(scope, b"origin")
        if b"*" in self._origins:
            return b"*" if origin else b""
        return origin if origin in self._origins else b""


def _head_bytes(scope: Any) -> int:
    target = len(scope.get("raw_path", b"")) + len(scope.get("query_string", b""))
    return target + sum(len(name) + len(value) + HEADER_LINE_BYTES for name, value in scope["headers"])


def _first(group: BaseExceptionGroup[HTTPException]) -> HTTPException:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, HTTPException)
    return found


def _has_path(target: str) -> bool:
    """quart does not look; it takes a whole URL for its path."""
    try:
        return target.startswith("/") or bool(urlsplit(target).path)
    except ValueError:
        return False


def _missing(present: Any, allowed: bytes) -> list[tuple[bytes, bytes]]:
    """Values that an answer has of its own are kept: the page of /docs, answers that may not be stored."""
    names = {bytes(name).lower() for name, _ in present}
    found = [(name, value) for name, value in STRICT.items() if name not in names]
    if allowed:
        found += [(b"access-control-allow-origin", allowed), (b"access-control-expose-headers", EXPOSED)]
        found += [(b"vary", b"origin")]
    else:
        found.append(SAME_ORIGIN)
    return found


def _preflight(scope: Any) -> list[tuple[bytes, bytes]]:
    asked = _header(scope, b"access-control-request-headers")
    headers = [
        (b"access-control-allow-methods", METHODS),
        (b"access-control-max-age", b"%d" % PREFLIGHT_AGE_S),
        (b"vary", b"access-control-request-headers"),
    ]
    if _HEADER_LIST.fullmatch(asked):  # the official clients send a dozen of their own
        headers.append((b"access-control-allow-headers", asked))
    return headers


def _header(scope: Any, name: bytes) -> bytes:
    return next((bytes(value) for header, value in scope["headers"] if header == name), b"")


async def _answer(send: Any, status: int, headers: list[tuple[bytes, bytes]], body: bytes = b"") -> None:
    if status != 204:
        headers = [*headers, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
