"""Whether the seeds accept this node: handshakes with them at the start, and again when gossip finds one silent.

Gossip drops what it cannot authenticate and tells nobody, so that a wrong cluster key would look like a seed that is
down. A handshake over TCP says which it is.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

import trio

from mesh.errors import HandshakeRefused, PeerUnavailable
from mesh.view import Address
from nodes.config import ConfigInvalid

logger = logging.getLogger(__name__)

# While no seed has answered a handshake, how often each is tried.
SEED_CHECK_INTERVAL_S = 2.0


class SeedCheck:
    """Of one node's seeds, which may be none."""

    def __init__(
        self,
        seeds: Sequence[Address],
        shake_hands: Callable[[Address], Awaitable[object]],
        node_id: str,
        cluster_name: str,
    ) -> None:
        """shake_hands: raises HandshakeRefused or PeerUnavailable."""
        self._seeds = seeds
        self._shake_hands = shake_hands
        self._node_id = node_id
        self._cluster_name = cluster_name
        self._silence = trio.Event()

    def note_silence(self) -> None:
        """Gossip got no answer from a seed."""
        self._silence.set()

    async def run(self) -> None:
        """Shake hands with the seeds until one accepts, and again when one is silent: it may refuse the key.

        Raises ConfigInvalid when all that answer at the start refuse this node. Later refusals are logged: who takes
        over a seed's address must not be able to stop a node that serves.
        """
        is_start = True
        told = ""
        while self._seeds:
            refusals = {}
            for seed in self._seeds:
                try:
                    await self._shake_hands(seed)
                except HandshakeRefused as exc:
                    refusals[seed] = exc.reason
                except PeerUnavailable:
                    continue  # gossip retries it, and its log line says so
                else:
                    refusals.clear()
                    self._silence = trio.Event()
                    await self._silence.wait()
                    break
            if refusals:
                message = _refused(refusals, self._node_id, self._cluster_name)
                if is_start:
                    raise ConfigInvalid(message)
                if message != told:
                    logger.error("every seed that answers refuses this node", extra={"reason": message})
                told = message
            is_start = False
            await trio.sleep(SEED_CHECK_INTERVAL_S)


def _refused(refusals: Mapping[Address, str], node_id: str, cluster_name: str) -> str:
    """One line for all seeds that answered and declined."""
    seeds = ", ".join(f"{address} ({reason})" for address, reason in refusals.items())
    fix = (
        "delete <data_dir>/keyring, if there is one, "
        "and give this node the mesh's own cluster key with --cluster-key-file"
    )
    if set(refusals.values()) == {"other cluster"}:
        fix = f"this node's --cluster-name is {cluster_name!r}; give it the mesh's"
    elif set(refusals.values()) == {"fenced"}:
        return (
            f"every seed that answers runs under this node's own name, {node_id!r}: {seeds}; "
            "give each node a --name and a --data-dir of its own"
        )
    elif set(refusals.values()) == {"protocol version"}:
        fix = "run versions of AI Cluster that share a protocol version"
    return f"every seed that answers refuses this node: {seeds}; {fix}"
