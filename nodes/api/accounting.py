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
from observability.trace_context import TraceContext, context_of_headers
from observability.tracing import Tracer, Value, log_fields, unrecorded

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
# Attributes of a traced request's span, by the log fields that say the same.
_SPAN_ATTRIBUTES = {
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "outcome": "ai_cluster.outcome",
    "executed_by": "ai_cluster.executed_by",
    "failovers": "ai_cluster.failovers",
    "client_left": "ai_cluster.client_left",
}


class Exchange:
    """What is known of one HTTP request while it lasts. Handlers fill it; the accounting reads it at the end."""

    def __init__(self, request_id: str, caller: TraceContext | None = None) -> None:
        """caller: of the client's traceparent."""
        self.request_id = request_id
        self.started = trio.current_time()
        self.span = unrecorded(caller)
        self.route = "unmatched"
        self.status = 0
        self.log_fields: dict[str, Any] = {}
        self.closing: list[trio.abc.AsyncResource] = []
        self.on_end: Callable[[bool], None] | None = None  # told whether the whole response was sent

    @property
    def trace(self) -> TraceContext | None:
        """What the request's work is opened under: this node's span of it, else the client's."""
        return self.span.context

    def begin_span(self, tracer: Tracer, method: str) -> None:
        """Trace it from its start on, if it is to be; its route is known. The accounting ends the span."""
        attributes = {"http.request.method": method, "http.route": self.route, "ai_cluster.request_id": self.request_id}
        self.span = tracer.request(f"{method} {self.route}", self.trace, attributes, start=self.started)


class Accounting:
    """Wraps an ASGI application."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], metrics: ApiMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = scope[SCOPE_KEY] = Exchange(_request_id(scope), context_of_headers(scope["headers"]))
        started = exchange.started
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
        trace = log_fields(exchange.trace)
        exemplar = {"request_id": exchange.request_id, "trace_id": trace.get("trace_id", "")}
        self._metrics.http_request(method, exchange.route, status, seconds, exemplar)
        is_our_fault = exchange.log_fields.get("outcome") == "error"
        level = logging.ERROR if is_our_fault else logging.INFO
        logger.log(
            logging.DEBUG if exchange.route in _QUIET_ROUTES else level,
            "request",
            extra={
                "request_id": exchange.request_id,
                **trace,
                "http.request.method": method,
                "http.route": exchange.route,
                "http.response.status_code": status,
                "duration_ms": round(seconds * 1000, 3),
                "client_left": not is_complete,
                **exchange.log_fields,
            },
        )
        if exchange.span.is_recording:
            _end_span(exchange, status, is_complete)


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


def _end_span(exchange: Exchange, status: int, is_complete: bool) -> None:
    """What the log line says of the request, as far as the conventions have a name for it. An error is what is our
    fault, as everywhere."""
    fields = exchange.log_fields | {"client_left": not is_complete}
    attributes: dict[str, Value] = {name: fields[key] for key, name in _SPAN_ATTRIBUTES.items() if key in fields}
    attributes["http.response.status_code"] = status
    if reasons := fields.get("finish_reason"):
        attributes["gen_ai.response.finish_reasons"] = reasons.split(",")
    exchange.span.set(attributes)
    is_fault = status >= 500 or fields.get("outcome") == "error"
    exchange.span.end(str(fields.get("error.type") or status) if is_fault else "")
