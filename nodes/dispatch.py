"""From a request to a stream of events: rank the nodes, open the best, and try the next while nothing has been sent.

A stream that has given its first event belongs to its node; when that node fails afterwards the reader is told so.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import trio

from mesh.errors import MeshError, NoCapacity, PeerUnavailable
from mesh.router import OwnDispatch, Router, RouteRequest
from mesh.view import ClusterView, MemberView
from nodes.generation import (
    DeadlineExceeded,
    GenerateEvent,
    GenerateRequest,
    GenerationFailed,
    Generator,
    RequestInvalid,
)

logger = logging.getLogger(__name__)

# Nodes tried for one request. Each failed try costs at most a connect timeout; more would outlast a client's patience.
TRIES_MAX = 4
# The executor ends a late request itself, and counts it as that; its word has this long to arrive.
DEADLINE_GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class DispatchStatistics:
    """forwards: streams opened on a peer. retries: moves to a next candidate, by reason."""

    forwards: int
    retries: Mapping[str, int]
    open_streams: int


class Dispatch:
    """Opens generations on the node that should serve them soonest.

    local: this node's engines. remote: makes the Generator of a peer.
    peer_failed is told the node id whenever a peer failed a request, so that gossip probes it at once.
    """

    def __init__(
        self,
        *,
        view: Callable[[], ClusterView],
        router: Router,
        local: Generator,
        remote: Callable[[MemberView], Generator],
        peer_failed: Callable[[str], None],
    ) -> None:
        self._view = view
        self._router = router
        self._local = local
        self._remote = remote
        self._peer_failed = peer_failed
        self._forwards = 0
        self._retries: Counter[str] = Counter()
        self._open_streams = 0

    async def open(self, request: GenerateRequest) -> DispatchedStream:
        """The stream of `request`, opened on the best node that takes it.

        Raises ModelUnknown, NoCapacity, RequestInvalid, DeadlineExceeded, or GenerationFailed when every node tried
        failed. Nothing stays open when it raises.
        """
        stream = DispatchedStream(self, request, trio.current_time() + request.deadline_s)
        await stream.open_next()
        return stream

    def statistics(self) -> DispatchStatistics:
        return DispatchStatistics(self._forwards, dict(self._retries), self._open_streams)


class DispatchedStream(trio.abc.ReceiveChannel[GenerateEvent]):
    """One generation as its reader sees it. node_id: the node that executes it; final once the first event is read.

    Holds no nursery, so it may cross from a handler to a response body. Closing it cancels the generation.
    """

    def __init__(self, dispatch: Dispatch, request: GenerateRequest, deadline: float) -> None:
        self._dispatch = dispatch
        self._request = request
        self._deadline = deadline
        self._stream: trio.abc.ReceiveChannel[GenerateEvent] | None = None
        self._entry: OwnDispatch | None = None
        self._failed: set[str] = set()
        self._has_begun = False
        self._has_finished = False
        self._is_closed = False
        self._refusal: NoCapacity | None = None
        self.node_id = ""

    async def receive(self) -> GenerateEvent:
        """The next event. Raises trio.EndOfChannel after the last, and GenerationError; both close the stream."""
        while True:
            if self._is_closed:
                raise trio.EndOfChannel
            if self._stream is None:  # a read that was cancelled while it moved to the next node
                await self.open_next()
                continue
            try:
                with trio.move_on_at(self._deadline + DEADLINE_GRACE_S):
                    event = await self._receive()
                    self._has_begun = True
                    return event
                raise DeadlineExceeded(f"the request's deadline of {self._request.deadline_s:g} s has passed")
            except (RequestInvalid, DeadlineExceeded, trio.EndOfChannel):
                await self.aclose()
                raise
            except (MeshError, GenerationFailed) as exc:
                node_id = self.node_id
                await self._close_stream()
                self._note_failure(node_id, exc)
                if self._has_begun:
                    self._is_closed = True
                    raise GenerationFailed(
                        f"node {node_id} failed in the middle of the answer; send the request again"
                    ) from exc

    async def open_next(self) -> None:
        """Open the best node not tried yet. Raises as Dispatch.open does."""
        dispatch, request = self._dispatch, self._request
        while len(self._failed) < TRIES_MAX:
            remaining_s = self._deadline - trio.current_time()
            if remaining_s <= 0:
                raise DeadlineExceeded(f"the request's deadline of {request.deadline_s:g} s has passed")
            view = dispatch._view()
            route = RouteRequest(request.model, request.text_bytes(), exclude=frozenset(self._failed))
            try:
                node_id = dispatch._router.rank(view, route, trio.current_time())[0]
            except NoCapacity as exc:
                raise self._refusal or exc from None
            member = view.members[node_id]
            # Counted before anything is awaited, so that requests of the same instant see each other.
            entry = dispatch._router.dispatched(node_id, request.model, request.text_bytes(), member.load_version)
            generator = dispatch._local if member.is_self else dispatch._remote(member)
            hops = request.hops if member.is_self else request.hops + 1
            try:
                stream = await generator.open(replace(request, deadline_s=remaining_s, hops=hops))
            except BaseException as exc:
                dispatch._router.finished(entry)
                if not isinstance(exc, MeshError | GenerationFailed):
                    raise
                self._note_failure(node_id, exc)
                continue
            if member.is_self:
                dispatch._router.finished(entry)  # from now on the own row of the view contains it
            self._stream, self._entry, self.node_id = stream, entry, node_id
            dispatch._open_streams += 1
            dispatch._forwards += not member.is_self
            return
        raise self._refusal or GenerationFailed(
            f"{len(self._failed)} nodes were tried and none could serve the request"
        )

    def _note_failure(self, node_id: str, error: Exception) -> None:
        self._failed.add(node_id)
        reason = type(error).__name__
        self._dispatch._retries[reason] += 1
        if isinstance(error, NoCapacity):
            self._refusal = error
        elif isinstance(error, PeerUnavailable):
            self._dispatch._peer_failed(node_id)
        logger.warning(
            "a node did not serve a request",
            extra={
                "request_id": self._request.request_id,
                "peer": node_id,
                "reason": reason,
                "error.message": str(error),
            },
        )

    async def _receive(self) -> GenerateEvent:
        """The next event; a stream that ends without a finish_reason is a failure, not an end."""
        assert self._stream is not None
        try:
            event = await self._stream.receive()
        except trio.EndOfChannel:
            if self._has_finished:
                raise
            raise GenerationFailed(f"node {self.node_id} ended the stream without finishing it") from None
        self._has_finished = event.finish_reason is not None
        return event

    async def aclose(self) -> None:
        self._is_closed = True
        await self._close_stream()

    async def _close_stream(self) -> None:
        stream, self._stream = self._stream, None
        entry, self._entry = self._entry, None
        if stream is not None and entry is not None:
            self._dispatch._open_streams -= 1
            self._dispatch._router.finished(entry)
            await stream.aclose()
