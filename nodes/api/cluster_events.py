"""GET /cluster/events, what happens in the mesh as server-sent events, and /cluster/views, who sees whom.

Events: the recent ones first, then live. With ?status=1 the mesh's status comes each second on the same connection, so
that a page that watches needs no other."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncGenerator, Callable
from typing import Any

import trio
from quart import Quart, Response, jsonify, request

from nodes.api.accounting import exchange_of
from nodes.api.services import Services
from nodes.api.sse import HEADERS, KEEP_ALIVE, EventStreamBody, named_event
from nodes.event_feed import EventFeed
from nodes.events import Event

KEEP_ALIVE_S = 5.0
STATUS_INTERVAL_S = 1.0
# A browser whose node has died tries again after so long.
RETRY = b"retry: 2000\n\n"
EVENT_ID_CHARS_MAX = 64


def register(app: Quart, services: Services, status: Callable[[], bytes]) -> None:
    """status: the body of /cluster/status."""

    @app.get("/cluster/events")
    async def cluster_events() -> Response:
        feed = services.events
        listener = feed.listen(request.remote_addr or "")
        exchange_of(request.scope).closing.append(listener)
        has_status = request.args.get("status") == "1"
        last_id = request.headers.get("last-event-id", "")
        response = Response(None, 200, HEADERS)
        response.response = EventStreamBody(_stream(feed, last_id, status if has_status else None))
        response.timeout = None
        return response

    @app.get("/cluster/views")
    async def cluster_views() -> Response:
        views = await services.member_views.views()
        return jsonify(
            {
                "node_id": services.node_id,
                "views": views.statuses,
                "silent": list(views.silent),
                "disputed": list(views.disputed),
            }
        )


async def _stream(feed: EventFeed, last_id: str, status: Callable[[], bytes] | None) -> AsyncGenerator[bytes, None]:
    yield RETRY
    revision = _revision(feed, last_id)
    status_at = -math.inf  # when the next one is due
    while not feed.is_closed:
        now = trio.current_time()
        if status is not None and now >= status_at:
            status_at = now + STATUS_INTERVAL_S
            yield named_event("status", status())
        for event in feed.since(revision):
            revision = event.revision
            yield _encoded(feed, event)
        is_silent = True
        with trio.move_on_at(trio.current_time() + KEEP_ALIVE_S if status is None else status_at):
            await feed.wait(revision)
            is_silent = False
        if is_silent and status is None:
            yield KEEP_ALIVE


def _revision(feed: EventFeed, last_id: str) -> int:
    """Up to which one the client has had them; 0 where it followed another life of this node, or none."""
    boot, _, revision = last_id[:EVENT_ID_CHARS_MAX].partition("-")
    known = boot == feed.boot and revision.isascii() and revision.isdigit()
    return min(int(revision), feed.revision) if known else 0


def _encoded(feed: EventFeed, event: Event) -> bytes:
    happening = event.happening
    body: dict[str, Any] = {
        "id": f"{feed.boot}-{event.number}",
        "at": round(event.at, 3),
        "kind": happening.kind,
        "node_id": happening.node_id,
        "reason": happening.reason,
        "count": event.count,
    }
    if happening.origin:
        body["origin"] = happening.origin
    data = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    return named_event("cluster", data, f"{feed.boot}-{event.revision}")
