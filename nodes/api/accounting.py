"""Every HTTP request gets an id, is counted, timed and logged once, and leaves nothing open behind.

An ASGI layer around the application, because only there the end of a streamed body and the client's leaving are seen.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import trio

from nodes.api.services import ApiMetrics

logger = logging.getLogger("nodes.api.access")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

SCOPE_KEY = "ai_cluster.exchange"
# A client's own request id is kept when it is safe to log and to send back.
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
# Closing a stream queues a frame and never waits for the network; this only bounds a fault of ours.
_CLOSE_TIMEOUT_S = 1.0
# Probed every few seconds by scrapers and balancers; at info they would be most of the log.
_QUIET_ROUTES = {
    "/health",
    "/health/live",
    "/health/ready",
    "/metrics",
    "/metrics/cluster",
    "/cluster/sd",
    "/cluster/status",
    "/cluster/views",
}
# W3C Trace Context: version, trace id, parent id, flags. A trace id of zeros is none.
_TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")


class Exchange:
    """What is known of one HTTP request while it lasts. Handlers fill it; the accounting reads it at the end."""

    def __init__(self, request_id: str, trace_id: str = "") -> None:
        self.request_id = request_id
        self.trace_id = trace_id  # of the client's trace; empty where it has none
        self.route = "unmatched"
        self.status = 0
        self.log_fields: dict[str, Any] = {}
        self.closing: list[trio.abc.AsyncResource] = []
        self.on_end: Callable[[bool], None] | None = None  # told whether the whole response was sent


class Accounting:
    """Wraps an ASGI application."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], metrics: ApiMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = scope[SCOPE_KEY] = Exchange(_request_id(scope), _trace_id(scope))
        started = trio.current_time()
        is_complete = False

        async def observe(message: Any) -> None:
            nonlocal is_complete
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", exchange.request_id.encode()),
                    (b"openai-processing-ms", b"%d" % ((trio.current_time() - started) * 1000)),
                ]
            elif not message.get("more_body", False):
                is_complete = True  # before it is sent: the server ends this task as soon as it has the last part
            await send(message)

        try:
            await self._app(scope, receive, observe)
        finally:
            with trio.move_on_after(_CLOSE_TIMEOUT_S, shield=True):
                for resource in exchange.closing:
                    await resource.aclose()
            if exchange.on_end is not None:
                exchange.on_end(is_complete)
            self._record(scope, exchange, trio.current_time() - started, is_complete)

    def _record(self, scope: Scope, exchange: Exchange, seconds: float, is_complete: bool) -> None:
        # 499: the client closed the connection before a response began (nginx's number, known to operators).
        status = exchange.status or 499
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        exemplar = {"request_id": exchange.request_id, "trace_id": exchange.trace_id}
        self._metrics.http_request(method, exchange.route, status, seconds, exemplar)
        logger.log(
            logging.DEBUG if exchange.route in _QUIET_ROUTES else logging.INFO,
            "request",
            extra={
                "request_id": exchange.request_id,
                **({"trace_id": exchange.trace_id} if exchange.trace_id else {}),
                "http.request.method": method,
                "http.route": exchange.route,
                "http.response.status_code": status,
                "duration_ms": round(seconds * 1000, 3),
                "client_left": not is_complete,
                **exchange.log_fields,
            },
        )


def exchange_of(scope: Any) -> Exchange:
    """The Exchange that Accounting put into an ASGI scope."""
    exchange: Exchange = scope[SCOPE_KEY]
    return exchange


_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return str(value.decode())
    return f"req_{uuid.uuid4().hex}"


def _trace_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"traceparent" and (found := _TRACEPARENT.fullmatch(value)) is not None:
            return str(found[1].decode())
    return ""
