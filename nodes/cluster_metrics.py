"""`/metrics/cluster`: every node's own metrics, fetched over the peer links at the same time, as one exposition.

For a Prometheus that reaches one node only. A node that does not answer in time is missing from it, with
`ai_cluster_cluster_scrape_up` at 0; what gossip tells of it is there all the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from mesh.errors import MeshError
from mesh.view import ClusterView, MemberStatus, MemberView
from observability.merge import TEXT_CONTENT_TYPE, merge
from observability.metrics import Exposition, accepts_gzip, exposition

QUESTION_METRICS = "metrics"
# Below Prometheus's usual scrape timeout of 10 s, so that one dead node costs its own metrics and not the scrape.
PEER_TIMEOUT_S = 4.0
PEERS_AT_ONCE_MAX = 32
# Of one node's text, unpacked: a hundred times the usual.
TEXT_BYTES_MAX = 16 * 1024 * 1024
# Such scrapes at once on one node; further ones wait.
SCRAPES_MAX = 2

# Sends a question to a peer and returns its answer; raises MeshError.
Ask = Callable[[MemberView, bytes], Awaitable[bytes]]


class ClusterMetrics:
    """view is instant; render gives this node's own metrics, as observability.metrics.Metrics.render does."""

    def __init__(
        self, *, view: Callable[[], ClusterView], ask: Ask, render: Callable[[str, str], Awaitable[Exposition]]
    ) -> None:
        self._view = view
        self._ask = ask
        self._render = render
        self._limit = trio.CapacityLimiter(SCRAPES_MAX)

    async def answer(self, question: bytes) -> bytes:
        """For a peer that asks: this node's own metrics, gzipped text."""
        return (await self._render("", "gzip")).body

    async def render(self, accept_encoding: str) -> Exposition:
        async with self._limit:
            view = self._view()
            members = [m for m in view.members.values() if m.status is not MemberStatus.LEFT]
            texts = {view.self_id: (await self._render("", "")).body.decode()}
            places = trio.CapacityLimiter(PEERS_AT_ONCE_MAX)
            async with trio.open_nursery() as nursery:
                for member in members:
                    if not member.is_self and member.status is not MemberStatus.DEAD:
                        nursery.start_soon(self._fetch, member, texts, places)
            is_up = {member.node_id: member.node_id in texts for member in members}
            write = partial(_write, view.self_id, texts, is_up, accepts_gzip(accept_encoding))
            return await trio.to_thread.run_sync(write)

    async def _fetch(self, member: MemberView, texts: dict[str, str], places: trio.CapacityLimiter) -> None:
        with trio.move_on_after(PEER_TIMEOUT_S):
            try:
                async with places:
                    packed = await self._ask(member, b"")
                texts[member.node_id] = await trio.to_thread.run_sync(_unpacked, packed)
            except (MeshError, ValueError):
                return  # its row of scrape_up says so


def _write(asked_id: str, texts: dict[str, str], is_up: dict[str, bool], is_gzipped: bool) -> Exposition:
    return exposition(TEXT_CONTENT_TYPE, merge(asked_id, texts, is_up).encode(), is_gzipped)


def _unpacked(packed: bytes) -> str:
    """Raises ValueError for what is no gzip of UTF-8 text, or too long."""
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        text = unpacker.decompress(packed, TEXT_BYTES_MAX)
    except zlib.error as exc:
        raise ValueError(f"no gzip: {exc}") from exc
    if unpacker.unconsumed_tail:
        raise ValueError(f"more than {TEXT_BYTES_MAX} bytes of text")
    return text.decode()
