"""What every answer tells browsers, whoever wrote it: nothing is guessed, framed or kept, and no foreign page reads it.

nodes.api.response_headers adds them to the application's answers; what the HTTP server answers itself has them too.
"""

from __future__ import annotations

# Of a request's target and headers; no client of the API sends a tenth of it. The HTTP server ends a head that grows
# beyond it while it comes; one that comes at once nodes.api.response_headers refuses.
HEAD_BYTES_MAX = 16 * 1024
STRICT = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"cache-control": b"no-store",
}
# Of answers that no configured origin may read.
SAME_ORIGIN = (b"cross-origin-resource-policy", b"same-origin")
LINES = b"".join(b"%s: %s\r\n" % header for header in (*STRICT.items(), SAME_ORIGIN))
_MARK = b"\r\nx-content-type-options: "
# hypercorn's own refusals, which no application sees: bytes that are no HTTP, a head too large, a websocket.
_BARE = b"\r\ncontent-length: 0\r\nconnection: close\r\n"


def refusal(status: bytes, headers: bytes, body: bytes = b"") -> bytes:
    """A whole HTTP/1.1 answer that ends its connection. status: such as `408 Request Timeout`. headers: whole lines."""
    return b"HTTP/1.1 %s\r\nconnection: close\r\ncontent-length: %d\r\n%s%s\r\n%s" % (
        status,
        len(body),
        headers,
        LINES,
        body,
    )


def with_strict_headers(data: bytes) -> bytes:
    """What is written to an HTTP/1.1 client: a head of hypercorn's own making gets them, all else stays as it is."""
    if data.startswith(b"HTTP/1.1 4") and _BARE in data and data.endswith(b"\r\n\r\n") and _MARK not in data:
        return data[:-2] + LINES + b"\r\n"
    return data
