"""Reads a request's body within bounds of size and time, so that a client that trickles holds no handler."""

from __future__ import annotations

import re

import trio
from quart import Request
from werkzeug.exceptions import RequestEntityTooLarge

from nodes.generation import RequestInvalid

# Any body may take this long, and what has come of it as much longer as it takes at this speed; the largest one may
# take about 14 minutes.
BODY_TIMEOUT_S = 60.0
BODY_BYTES_PER_S_MIN = 8 * 1024
_ENCODING = re.compile(r"[a-z0-9, -]{1,40}")


async def read_body(request: Request) -> bytes:
    """The whole body. Raises RequestInvalid for one that is compressed (415) or comes too slowly (408), and
    RequestEntityTooLarge above the app's MAX_CONTENT_LENGTH."""
    _check_encoding(request.headers.get("content-encoding", ""))
    parts: list[bytes] = []
    size = 0
    started = trio.current_time()
    with trio.CancelScope(deadline=started + BODY_TIMEOUT_S) as scope:
        async for part in request.body:
            parts.append(part)
            size += len(part)
            if request.max_content_length is not None and size > request.max_content_length:
                raise RequestEntityTooLarge  # quart checks what waits to be read, which reading takes away
            scope.deadline = started + BODY_TIMEOUT_S + size / BODY_BYTES_PER_S_MIN
    if scope.cancelled_caught:
        raise RequestInvalid(
            f"{size} bytes of the body came in {trio.current_time() - started:.0f} s; beyond {BODY_TIMEOUT_S:g} s it "
            f"has to come at {BODY_BYTES_PER_S_MIN} bytes a second at least",
            code="request_timeout",
            status=408,
        )
    return b"".join(parts)


def _check_encoding(value: str) -> None:
    """Raises RequestInvalid: a small body that unpacks to a large one would pass every bound on its size."""
    encoding = value.strip().lower()
    if encoding not in ("", "identity"):
        shown = encoding if _ENCODING.fullmatch(encoding) else "none that is known"
        raise RequestInvalid(
            f"the body's content encoding is {shown}; send it as it is, without content-encoding",
            code="unsupported_media_type",
            status=415,
        )
