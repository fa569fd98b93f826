"""Who may call /admin: whoever shows the admin token, from whatever address."""

from __future__ import annotations

import hmac
from collections.abc import Callable

import trio

from nodes.access.gate import FailureLimiter, LimitReached, Unauthorized


class AdminAccess:
    """token: of this node alone; its peers have others."""

    def __init__(self, token: str, now: Callable[[], float] = trio.current_time) -> None:
        self._token = token.encode()
        self._now = now
        self._failures = FailureLimiter()

    def authorize(self, authorization: str, address: str) -> None:
        """authorization: the header; address: the client's IP. Raises Unauthorized, and LimitReached for an address
        that shows wrong token after wrong token."""
        scheme, _, shown = authorization.partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(shown.strip().encode(), self._token):
            # Who shows none does not guess.
            retry_after_s = self._failures.failed(address, self._now()) if authorization else None
            if retry_after_s is not None:
                raise LimitReached("too many wrong admin tokens from this address", "address", retry_after_s, {})
            raise Unauthorized(
                "/admin takes this node's admin token as bearer: <data-dir>/admin-token, or AI_CLUSTER_ADMIN_TOKEN as "
                "the node was started with (ai-cluster finds it with --data-dir)"
            )
