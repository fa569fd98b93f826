"""The HTTP application: routes, and the one place where errors become OpenAI's error objects."""

from __future__ import annotations

import logging

from quart import Quart, Response, jsonify, request
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException

from nodes.api import (
    admin,
    chat,
    cluster,
    cluster_events,
    completions,
    embeddings,
    keys,
    models,
    openapi,
    operations,
    web,
)
from nodes.api.accounting import Accounting, exchange_of
from nodes.api.errors import api_error
from nodes.api.response_headers import ResponseHeaders
from nodes.api.services import Services
from observability.tracing import log_fields

logger = logging.getLogger(__name__)

TRACED_PREFIX = "/v1/"  # of the routes whose POST requests have spans: those that models answer


def build_app(services: Services) -> Accounting:
    """The ASGI application of one node."""
    app: Quart = QuartTrio("ai_cluster", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = services.body_bytes_max
    app.config["RESPONSE_TIMEOUT"] = None  # streams last as long as their deadline
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False

    @app.before_request
    async def note_route() -> None:
        if request.url_rule is not None:
            exchange = exchange_of(request.scope)
            exchange.route = request.url_rule.rule
            if request.method == "POST" and exchange.route.startswith(TRACED_PREFIX):
                exchange.begin_span(services.tracer, request.method)

    @app.errorhandler(Exception)
    async def answer_error(error: Exception) -> tuple[Response, int, dict[str, str]]:
        known = api_error(error)
        exchange = exchange_of(request.scope)
        exchange.log_fields |= {"error.type": type(error).__name__, "error.message": known.message}
        if known.status == 500:
            fields = {"request_id": exchange.request_id, **log_fields(exchange.trace)}
            logger.error("unexpected error", exc_info=error, extra=fields)
        headers = known.headers()
        if isinstance(error, HTTPException):
            # What the status obliges to, such as Allow with 405; the body is ours.
            headers |= {name: value for name, value in error.get_headers() if name.lower() == "allow"}
        return jsonify(known.body()), known.status, headers

    chat.register(app, services)
    completions.register(app, services)
    embeddings.register(app, services)
    models.register(app, services)
    operations.register(app, services)
    status = cluster.status_source(services)
    cluster.register(app, services)
    cluster_events.register(app, services, status)
    admin.register(app, services)
    keys.register(app, services)
    openapi.register(app, services)
    web.register(app)
    return Accounting(ResponseHeaders(app, services.cors_origins), services.metrics)
