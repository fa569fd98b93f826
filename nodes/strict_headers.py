"""What every answer tells browsers, whoever wrote it: nothing is guessed, framed or kept, and no foreign page reads it.

nodes.api.response_headers adds them to the application's answers; what the HTTP server answers itself has them too, and
OpenAI's error object as every refusal.
"""

from __future__ import annotations

import json

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
_JSON = b"content-type: application/json\r\n"
# hypercorn's own refusals, which no application sees, are statuses of _ERRORS with these two lines.
_EMPTY = b"content-length: 0\r\n"
_CLOSE = b"\r\nconnection: close\r\n"


def _error(code: str, message: str) -> bytes:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return json.dumps({"error": error}).encode()


_ERRORS = {
    b"400": _error("bad_request", "this is no HTTP: the head is malformed or names no host, or chunks are malformed"),
    b"431": _error("request_header_fields_too_large", f"more than {HEAD_BYTES_MAX} bytes of request line and headers"),
    b"501": _error("not_implemented", "the only transfer coding known here is chunked, given once"),
}


def refusal(status: bytes, headers: bytes, body: bytes = b"") -> bytes:
    """A whole HTTP/1.1 answer that ends its connection. status: such as `408 Request Timeout`. headers: whole lines."""
    return b"HTTP/1.1 %s\r\nconnection: close\r\ncontent-length: %d\r\n%s%s\r\n%s" % (
        status,
        len(body),
        headers,
        LINES,
        body,
    )


def slow_head_refusal(timeout_s: float) -> bytes:
    body = _error("request_timeout", f"the request's head did not come within {timeout_s:g} s")
    return refusal(b"408 Request Timeout", _JSON, body)


def with_strict_headers(data: bytes) -> bytes:
    """What is written to an HTTP/1.1 client: a head of hypercorn's own making gets them, and a body that says what is
    wrong; all else stays as it is."""
    body = _ERRORS.get(data[9:12])
    if body is None or not data.startswith(b"HTTP/1.1 ") or not data.endswith(b"\r\n\r\n"):
        return data
    if _EMPTY not in data or _CLOSE not in data.lower() or _MARK in data:
        return data
    head = data[:-2].replace(_EMPTY, b"content-length: %d\r\n%s" % (len(body), _JSON), 1)
    return head + LINES + b"\r\n" + body
