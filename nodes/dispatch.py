"""From a request to a stream of events that outlives its nodes: who generates, who goes on when that one fails.

Ranks the nodes and opens the best; what becomes of an answer afterwards is nodes.dispatched_stream's. One task watches
all streams for nodes that make no progress, and asks those for a probe.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import trio

from mesh.errors import MeshError
from mesh.router import Router
from mesh.view import ClusterView, MemberView
from nodes.attempts import AttemptCounts, Attempts, Move
from nodes.dispatched_stream import DispatchedStream
from nodes.generation import GenerateRequest, GenerationError, Generator, Sampling
from observability.tracing import NO_TRACING, Tracer

logger = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.25
PROBE_TIMEOUT_S = 5.0
NOISE_SEED_BITS = 63


@dataclass(frozen=True, slots=True)
class DispatchStatistics:
    """Totals as AttemptCounts has them, and the streams open and nodes degraded now."""

    forwards: int
    retries: Mapping[str, int]
    failovers: Mapping[str, int]
    resumed_tokens: int
    lost: int
    hedges: Mapping[str, int]
    hedge_tokens: int
    probes: Mapping[str, int]
    open_streams: int
    witnessed: int


class Dispatch:
    """Opens generations on the node that should serve them soonest.

    view: the cluster, this node's own row as of now. local: this node's engines. remote: makes the Generator of a peer.
    peer_failed is told the node id whenever a peer failed a request, so that gossip probes it at once. hedges: open a
    request whose first token is late on a second node. on_move is told of every answer that goes on elsewhere. tracer:
    of the search for nodes and the ways to them.
    """

    def __init__(
        self,
        *,
        view: Callable[[], ClusterView],
        router: Router,
        local: Generator,
        remote: Callable[[MemberView], Generator],
        peer_failed: Callable[[str], None],
        rng: random.Random,
        hedges: bool = False,
        on_move: Callable[[Move], None] = lambda move: None,
        tracer: Tracer = NO_TRACING,
    ) -> None:
        self._attempts = Attempts(
            view=view,
            router=router,
            local=local,
            remote=remote,
            peer_failed=peer_failed,
            hedges=hedges,
            on_move=on_move,
            tracer=tracer,
        )
        self._rng = rng
        self._streams: set[DispatchedStream] = set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch until cancelled. Streams work without it, but none notices that its node hangs."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                await trio.sleep(WATCH_INTERVAL_S)
                for member, model in self._watch(trio.current_time()):
                    nursery.start_soon(self._probe, member, model)

    async def open(self, request: GenerateRequest) -> DispatchedStream:
        """The stream of `request`, opened on the best node that takes it.

        Raises ModelUnknown, NoCapacity, RequestInvalid, DeadlineExceeded, or GenerationFailed when every node tried
        failed. Nothing stays open when it raises.
        """
        stream = DispatchedStream(
            self._attempts,
            replace(request, noise_seed=self._rng.getrandbits(NOISE_SEED_BITS)),
            request.text_blocks(),
            running=self._streams.__len__,
            on_end=self._streams.discard,
        )
        self._streams.add(stream)
        await stream.open()
        return stream

    def move_local(self) -> int:
        """Have the answers that this node's own engines generate for its own clients go on elsewhere, where somebody
        takes them. Returns how many there are."""
        local = [stream for stream in self._streams if stream.is_local]
        for stream in local:
            stream.interrupt("drain")
        return len(local)

    @property
    def counts(self) -> AttemptCounts:
        """What statistics() tells; whoever else has nodes serve requests adds to it."""
        return self._attempts.counts

    @property
    def witnessed(self) -> frozenset[str]:
        """Node ids that this node saw accept streams and make no progress."""
        return self._attempts.witness.degraded

    def statistics(self) -> DispatchStatistics:
        counts = self._attempts.counts
        return DispatchStatistics(
            forwards=counts.forwards,
            retries=dict(counts.retries),
            failovers=dict(counts.failovers),
            resumed_tokens=counts.resumed_tokens,
            lost=counts.lost,
            hedges=dict(counts.hedges),
            hedge_tokens=counts.hedge_tokens,
            probes=dict(counts.probes),
            open_streams=len(self._streams),
            witnessed=len(self.witnessed),
        )

    # The watch.

    def _watch(self, now: float) -> list[tuple[MemberView, str]]:
        """Move streams off nodes that hang; whom to probe."""
        witness = self._attempts.witness
        if not self._streams and not witness.degraded:
            return []
        view = self._attempts.view()
        by_place: dict[tuple[str, str], list[DispatchedStream]] = {}
        for stream in self._streams:
            if stream.place is not None:
                by_place.setdefault(stream.place, []).append(stream)
        known = witness.degraded
        for place in witness.observe(by_place, view, now):
            if place[0] not in known:
                logger.warning("a node accepts streams and makes no progress", extra={"peer": place[0]})
            for stream in by_place[place]:
                if not stream.is_interrupted and self._attempts.take_from_budget(len(self._streams)):
                    stream.interrupt("hang")
        return list(witness.probes_due(view, now))

    async def _probe(self, member: MemberView, model: str) -> None:
        """Ask a degraded node for one token."""
        request = GenerateRequest(
            request_id=f"probe-{self._rng.getrandbits(32):08x}",
            model=model,
            messages=({"role": "user", "content": "Hello"},),
            sampling=Sampling(temperature=0.0, max_tokens=1),
            deadline_s=PROBE_TIMEOUT_S,
            hops=0 if member.is_self else 1,
        )
        outcome = "failed"
        with trio.move_on_after(PROBE_TIMEOUT_S):
            try:
                stream = await self._attempts.generator(member).open(request)
                async with stream:
                    await stream.receive()
                outcome = "served"
            except (MeshError, GenerationError, trio.EndOfChannel) as exc:
                logger.info("a probe failed", extra={"peer": member.node_id, "error.message": str(exc)})
        self._attempts.counts.probes[outcome] += 1
        if outcome == "served" and self._attempts.witness.served(member.node_id):
            logger.info("a degraded node serves again", extra={"peer": member.node_id})
