"""Who calls /v1: the gate's answer to a request's header and address."""

from __future__ import annotations

from quart import request

from nodes.access.gate import Caller
from nodes.api.services import Services


async def authenticate(services: Services) -> Caller:
    """Of the request at hand. Raises Unauthorized, LimitReached."""
    return await services.gate.authenticate(request.headers.get("authorization", ""), request.remote_addr or "")
