"""Why a `models` command could not do its work. A message is one line: the thing, the reason, the fix."""

from __future__ import annotations


class ModelToolError(Exception):
    """What stands in the way is here, on this machine or on the command line; doing it again does not mend it."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class HubUnreachable(ModelToolError):
    """The network or the hub failed; what was downloaded stays, and the same command goes on from there."""
