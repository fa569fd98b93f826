"""Who may call /admin: whoever shows the admin token, from whatever address."""

from __future__ import annotations

import hmac

from nodes.access.gate import Unauthorized


class AdminAccess:
    """token: of this node alone; its peers have others."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    def authorize(self, authorization: str) -> None:
        """authorization: the header. Raises Unauthorized."""
        scheme, _, shown = authorization.partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(shown.strip().encode(), self._token):
            raise Unauthorized(
                "/admin takes this node's admin token as bearer: <data-dir>/admin-token, or AI_CLUSTER_ADMIN_TOKEN as "
                "the node was started with (ai-cluster finds it with --data-dir)"
            )
