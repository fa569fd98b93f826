"""Who may call /v1: on loopback everyone, elsewhere nobody yet unless the node was started open."""

from __future__ import annotations

from nodes.api.errors import Unauthorized

# The key_id under which requests count that showed no key of this cluster, because none exists.
ANONYMOUS = "anonymous"


class Access:
    """Decides on each request to /v1. is_open: the address is loopback, or `open` was configured."""

    def __init__(self, *, is_open: bool) -> None:
        self._is_open = is_open

    def authorize(self) -> str:
        """The key_id that metrics count the request under. Raises Unauthorized."""
        if not self._is_open:
            raise Unauthorized(
                "this node's HTTP address is off loopback and API keys are not part of this version: "
                "start it with --open behind a proxy that checks its clients, or bind --http to 127.0.0.1"
            )
        return ANONYMOUS
