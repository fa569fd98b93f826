"""The mesh's error tree. Each says whose fault it is; the message names the value and the limit, never a key."""

from __future__ import annotations


class MeshError(Exception):
    """Root of what mesh/ raises on purpose."""


class MalformedDatagram(MeshError):
    """Bytes that are no message of this protocol. Nothing was changed by them."""


class SealRejected(MeshError):
    """A datagram or frame that this node's keyring does not authenticate, or has seen before.

    reason: a short label for counting."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class KeyRefused(MeshError):
    """A change of the keyring that would leave this node without a key it needs. The keyring is as before."""


class MalformedFrame(MeshError):
    """Bytes on a peer link that are no frame of this protocol; the link is closed."""


class HandshakeRefused(MeshError):
    """The peer answered and declined. reason: "unknown key", "other cluster", "protocol version", "fenced", …"""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class PeerUnavailable(MeshError):
    """The peer cannot be reached, went away, or broke the stream; another node may serve.

    No event was lost silently."""


class NoCapacity(MeshError):
    """No node can take the request now. retry_after_s: estimate from gossip of when one can."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelUnknown(MeshError):
    """No member of the mesh has a model of that name."""
