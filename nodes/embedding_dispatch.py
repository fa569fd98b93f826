"""From a request for embeddings to its vectors: who computes them, and who does when that one fails.

A request of many inputs is computed in pieces, which may go to several nodes; all of one request are of one model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import trio

from mesh.errors import MeshError, ModelUnknown, NoCapacity, PeerUnavailable
from mesh.router import Router, RouteRequest
from mesh.view import EMBEDDING, ClusterView, MemberView
from nodes.attempts import AttemptCounts, forward_span, trace_route
from nodes.dispatched_stream import DEADLINE_GRACE_S, TRIES_MAX
from nodes.embedding import Embedder, Embeddings, EmbedRequest, Vectors, input_bytes
from nodes.exclusions import others_left
from nodes.generation import DeadlineExceeded, GenerationError, GenerationFailed, RequestInvalid
from nodes.span_ends import ending
from observability.tracing import NO_TRACING, Tracer, log_fields

logger = logging.getLogger(__name__)

# Of one piece, so that an answer of 8,192 dimensions fits into a few megabytes and small requests need not wait long.
PIECE_INPUTS_MAX = 128
# Nodes whose engine may break over one piece: where two do it is its inputs' fault, and they are kept from the others.
FAULTS_MAX = 2
PIECES_AT_ONCE = 4  # of one request: enough to keep several nodes busy


@dataclass(frozen=True, slots=True)
class Embedded:
    """What came of a request. node_ids: who computed it, each once."""

    vectors: Vectors
    prompt_tokens: int
    node_ids: tuple[str, ...]


class EmbeddingDispatch:
    """Has embeddings computed on the nodes that should have them soonest.

    view: the cluster, this node's own row as of now. local: this node's engines. remote: makes the Embedder of a peer.
    peer_failed is told the node id whenever a peer failed a request. counts: forwards and retries are added to. tracer:
    of the search for nodes and the ways to them."""

    def __init__(
        self,
        *,
        view: Callable[[], ClusterView],
        router: Router,
        local: Embedder,
        remote: Callable[[MemberView], Embedder],
        peer_failed: Callable[[str], None],
        counts: AttemptCounts,
        tracer: Tracer = NO_TRACING,
    ) -> None:
        self._view = view
        self._router = router
        self._local = local
        self._remote = remote
        self._peer_failed = peer_failed
        self._counts = counts
        self._tracer = tracer

    async def embed(self, request: EmbedRequest) -> Embedded:
        """All vectors of a request. Raises ModelUnknown, NoCapacity, RequestInvalid, DeadlineExceeded, or
        GenerationFailed when every node tried failed."""
        deadline = trio.current_time() + request.deadline_s
        first, *others = _pieces(request)
        node_id, answer = await self._place(first, deadline)
        answers: list[Embeddings] = [answer] * (1 + len(others))
        node_ids = {node_id: None}
        limit = trio.CapacityLimiter(PIECES_AT_ONCE)

        async def place(index: int, piece: EmbedRequest) -> None:
            async with limit:
                node_id, answers[index] = await self._place(piece, deadline)
                node_ids[node_id] = None

        failure: BaseException | None = None
        try:
            async with trio.open_nursery() as nursery:
                for index, piece in enumerate(others, 1):
                    # Vectors of different models cannot be compared, whatever their name.
                    nursery.start_soon(place, index, replace(piece, fingerprint=answer.fingerprint))
        except* (MeshError, GenerationError) as group:
            failure = _first(group)
        if failure is not None:
            raise failure
        return Embedded(
            np.concatenate([answer.vectors for answer in answers]),
            sum(answer.prompt_tokens for answer in answers),
            tuple(node_ids),
        )

    async def _place(self, piece: EmbedRequest, deadline: float) -> tuple[str, Embeddings]:
        """Who computed it, and what. Raises as embed() does."""
        size = sum(map(input_bytes, piece.inputs))
        failed: set[str] = set()
        refusal: NoCapacity | None = None
        fault: GenerationFailed | None = None
        faults = 0
        while len(failed) < TRIES_MAX:
            since = trio.current_time()
            remaining_s = deadline - since
            if remaining_s <= 0:
                raise _too_late(piece)
            route = RouteRequest(
                piece.model,
                size,
                exclude=frozenset(failed),
                fingerprint=piece.fingerprint,
                was_refused=refusal is not None,
                kind=EMBEDDING,
                identity=hash((piece.fairness_id, piece.inputs, piece.dimensions)),
            )
            view = self._view()
            try:
                order = self._router.rank(view, route, since)
            except (ModelUnknown, NoCapacity) as exc:
                trace_route(self._tracer, piece.trace, (), since=since, error=type(exc).__name__)
                if fault is not None and faults == len(failed) and not others_left(view, piece.model, failed):
                    raise fault from None
                if isinstance(exc, NoCapacity):
                    raise
                raise refusal or exc from None
            node_id = order[0]
            trace_route(self._tracer, piece.trace, order, self._router.latest_estimate_s, since=since)
            try:
                number = 1 + len(failed)
                answer = await self._try(view.members[node_id], replace(piece, deadline_s=remaining_s), size, number)
            except (RequestInvalid, DeadlineExceeded):
                raise  # no other node would do better
            except (MeshError, GenerationError) as exc:
                failed.add(node_id)
                refusal = exc if isinstance(exc, NoCapacity) else refusal
                self._note_failure(piece, node_id, exc)
                if isinstance(exc, GenerationFailed):
                    fault, faults = exc, faults + 1
                if faults >= FAULTS_MAX:
                    raise
            else:
                return node_id, answer
        if refusal is not None:
            raise self._router.refused(view, replace(route, exclude=frozenset(failed)), trio.current_time())
        raise GenerationFailed(f"{len(failed)} nodes were tried and none could serve the request")

    async def _try(self, member: MemberView, request: EmbedRequest, size: int, number: int) -> Embeddings:
        """number: of the attempt."""
        # Counted before anything is awaited, so that requests of the same instant see each other.
        entry = self._router.dispatched(member.node_id, request.model, size, member.load_version)
        try:
            if member.is_self:
                self._router.opened(entry)  # its engine has it as soon as it is encoded, and the own row with it
                return await self._local.embed(request)
            self._counts.forwards += 1
            return await self._forward(member, request, number)
        finally:
            self._router.finished(entry)

    async def _forward(self, member: MemberView, request: EmbedRequest, number: int) -> Embeddings:
        span = forward_span(self._tracer, request.trace, member, request.model, number, 0, None)
        with ending(span):
            # The executor ends a late request itself; its word has a moment to arrive.
            with trio.move_on_after(request.deadline_s + DEADLINE_GRACE_S):
                return await self._remote(member).embed(replace(request, hops=request.hops + 1, trace=span.context))
            raise _too_late(request)

    def _note_failure(self, piece: EmbedRequest, node_id: str, error: MeshError | GenerationError) -> None:
        self._counts.retries[type(error).__name__] += 1
        if isinstance(error, PeerUnavailable):
            self._peer_failed(node_id)
        logger.warning(
            "a node did not serve a request",
            extra={
                "request_id": piece.request_id,
                **log_fields(piece.trace),
                "peer": node_id,
                "reason": type(error).__name__,
                "error.message": str(error),
            },
        )


def _pieces(request: EmbedRequest) -> list[EmbedRequest]:
    return [
        replace(request, inputs=request.inputs[start : start + PIECE_INPUTS_MAX], first_index=start)
        for start in range(0, len(request.inputs), PIECE_INPUTS_MAX)
    ]


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _too_late(request: EmbedRequest) -> DeadlineExceeded:
    return DeadlineExceeded("the request's deadline passed before its embeddings were there")
