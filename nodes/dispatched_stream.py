"""One answer as its reader sees it, whichever nodes generate it one after the other.

The stream keeps the ids so far. When the node that generates is lost, hangs, breaks or drains, the next best one is
given the request with these ids and goes on at the next token, so nothing is lost or doubled; what the reader sees is
a pause.

    until the first event   a node that fails is followed by the next best, TRIES_MAX in all; no capacity is told
    from then on            the answer is owed: it is tried again and again, also where no node is ready at the moment,
                            for PATIENCE_S since the node was lost, while some node could become one that goes on
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import trio

from mesh.errors import MeshError, ModelUnknown, NoCapacity, PeerUnavailable
from mesh.first_token import tokens_of
from mesh.router import RouteRequest
from mesh.view import ClusterView, MemberStatus, MemberView, Readiness
from nodes.attempts import Attempt, AttemptFailed, Attempts, Move, trace_route
from nodes.exclusions import EXCLUDED_FULL_S, EXCLUDED_S, Exclusions, others_left
from nodes.generation import (
    DeadlineExceeded,
    GenerateEvent,
    GenerateRequest,
    GenerationError,
    GenerationFailed,
    GenerationMoved,
    RequestInvalid,
)
from nodes.race import race
from nodes.span_ends import end_with
from observability.trace_context import TraceContext
from observability.tracing import log_fields

logger = logging.getLogger(__name__)

# Nodes tried for one request. Each failed try costs at most a connect timeout; more would outlast a client's patience.
TRIES_MAX = 4
# The executor ends a late request itself, and counts it as that; its word has this long to arrive.
DEADLINE_GRACE_S = 1.0
# How long an answer that had begun waits for a node that goes on: longer than a death takes to be known, and than a
# restart; shorter than clients give up.
PATIENCE_S = 15.0
RETRY_INTERVAL_S = 0.1

Failure = MeshError | GenerationError
Reason = Literal["hang", "drain"]


class DispatchedStream(trio.abc.ReceiveChannel[GenerateEvent]):
    """path: the nodes that generated it, in order. moves: how it came from one to the next, hedges that won included.
    failovers: moves since its first event. first_token_s: from the request to its first event; None before.

    Holds no nursery, so it may cross from a handler to a response body. Closing it cancels the generation."""

    def __init__(
        self,
        attempts: Attempts,
        request: GenerateRequest,
        blocks: tuple[int, ...],
        *,
        running: Callable[[], int],
        on_end: Callable[[DispatchedStream], None],
    ) -> None:
        """blocks: names of the conversation's beginning. running: streams open here. on_end: called once."""
        self.path: list[str] = []
        self.moves: list[Move] = []
        self.failovers = 0
        self.first_token_s: float | None = None
        self._attempts = attempts
        self._request = request
        self._route = RouteRequest(request.model, request.text_bytes(), blocks=blocks, identity=request.identity())
        self._running = running
        self._on_end = on_end
        self._opened_at = trio.current_time()
        self._deadline = self._opened_at + request.deadline_s
        self._attempt: Attempt | None = None
        self._rival: Attempt | None = None  # the second opening of a request whose first token is late
        self._was_hedged = False
        self._held: GenerateEvent | None = None  # the first event, while the loser of the race is closed
        self._ids: list[int] = []  # of the answer so far; at most the model's context
        self._fingerprint = ""  # of the model that they are of
        self._excluded = Exclusions()
        self._failures = 0  # in a row
        self._last_failure: tuple[str, Failure] | None = None
        self._has_only_faults = True  # no node was away, full or draining
        self._lost_at: float | None = None  # since when a begun answer has given nothing because its node failed
        self._has_begun = False
        self._loss = ""  # why it has to go on elsewhere, until it does
        self._is_closed = False
        self._refusal: NoCapacity | None = None
        self._interruption: Reason | None = None
        self._waiting: trio.CancelScope | None = None
        self._attempts_made = 0
        self._latest_span: TraceContext | None = None  # of the attempt before, where it was a peer's
        self._log_fields = {"request_id": request.request_id, **log_fields(request.trace)}

    @property
    def node_id(self) -> str:
        """Who generates it now, or did last."""
        return self.path[-1] if self.path else ""

    @property
    def place(self) -> tuple[str, str] | None:
        """(node id, model) where it is generated; None while it is nowhere."""
        return None if self._attempt is None else (self._attempt.node_id, self._request.model)

    @property
    def is_local(self) -> bool:
        return self._attempt is not None and self._attempt.is_local

    @property
    def is_interrupted(self) -> bool:
        return self._interruption is not None

    def interrupt(self, reason: Reason) -> None:
        """Have it go on at another node, where one takes it."""
        self._interruption = reason
        if self._waiting is not None:
            self._waiting.cancel()

    async def open(self) -> None:
        """Raises as Dispatch.open does; it is closed then."""
        try:
            await self._open_next()
        except BaseException:
            self._end()
            raise

    async def receive(self) -> GenerateEvent:
        """The next event. Raises trio.EndOfChannel after the last, GenerationError and MeshError; each closes it."""
        if self._is_closed:
            raise trio.EndOfChannel
        try:
            while True:
                if self._attempt is None:
                    await self._open_next()
                elif self._interruption is not None:
                    await self._move(self._interruption)
                event = await self._read()
                if event is not None:
                    self._note(event)
                    return event
        except (GenerationError, MeshError, trio.EndOfChannel) as exc:
            if self._has_begun and not isinstance(exc, trio.EndOfChannel):
                self._attempts.counts.lost += 1
            await self.aclose()
            raise

    async def aclose(self) -> None:
        attempt, rival = self._attempt, self._rival
        self._attempt = self._rival = None
        self._end()
        try:
            if attempt is not None:
                await attempt.close()
        finally:  # also where the first one's was cancelled
            if rival is not None:
                await rival.close()
        await trio.lowlevel.checkpoint()

    def _end(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._on_end(self)

    # Reading.

    async def _read(self) -> GenerateEvent | None:
        """The next event; None where the answer has to go on elsewhere."""
        assert self._attempt is not None
        try:
            with trio.move_on_at(self._deadline + DEADLINE_GRACE_S) as self._waiting:
                return await (self._attempt.receive() if self._has_begun else self._first_event())
        except (MeshError, GenerationError) as exc:
            if self._is_final(exc):
                raise
            attempt, self._attempt = self._attempt, None
            self._note_failure(attempt.member, exc)
            await attempt.close()
            return None
        finally:
            self._waiting = None
        if self._interruption is None:
            late = self._too_late()
            end_with(self._attempt.span, late)
            raise late
        return None

    async def _first_event(self) -> GenerateEvent:
        """Where it is late, the first of two nodes gives it."""
        assert self._attempt is not None
        if self._held is not None:
            return self._take_held()
        if not self._was_hedged:
            late_s = self._attempts.late_after_s(self._request.model)
            if late_s is None:
                return await self._attempt.receive()
            with trio.move_on_at(self._opened_at + late_s):
                return await self._attempt.receive()
            await self._open_rival(self._attempt)
        if self._rival is None:
            return await self._attempt.receive()
        result = await race([self._attempt, self._rival])
        counts = self._attempts.counts
        counts.hedge_tokens += result.wasted_tokens
        loser = self._attempt if result.winner is self._rival else self._rival
        counts.hedges["none" if result.winner is None else "first" if loser is self._rival else "second"] += 1
        if result.winner is not None:
            if result.winner is self._rival:
                self.moves.append(Move("hedge", self.node_id, result.winner.node_id, "late"))
            self._attempt = result.winner
            self.path[-1] = result.winner.node_id
        self._rival = None
        for attempt, error in result.failures:
            if attempt is not self._attempt:  # that one's failure is noted as any other is
                self._blame(attempt.member, error)
        self._held = result.event
        await loser.close()
        if result.event is None:
            raise next(error for attempt, error in result.failures if attempt is self._attempt)
        return self._take_held()

    def _take_held(self) -> GenerateEvent:
        assert self._held is not None
        event, self._held = self._held, None
        return event

    async def _open_rival(self, first: Attempt) -> None:
        """At most one, and none where it would take more than its share."""
        self._was_hedged = True
        if not self._attempts.take_from_budget(self._running()):
            return
        view = self._attempts.view()
        exclude = self._excluded_now(view) | {first.node_id}
        try:
            self._rival = await self._try(view, exclude, self._request_now(), trio.current_time())
        except (AttemptFailed, NoCapacity, ModelUnknown):
            return
        self._attempts.counts.hedge_tokens += tokens_of(self._route.prompt_bytes)
        self._attempts.on_move(Move("hedge", first.node_id, self._rival.node_id, "late"))

    def _note(self, event: GenerateEvent) -> None:
        assert self._attempt is not None
        now = trio.current_time()
        if not self._has_begun:
            self._has_begun = True
            self.first_token_s = now - self._opened_at
            self._attempts.note_first_token(self._request.model, self.first_token_s)
            info = self._attempt.member.model(self._request.model)
            self._fingerprint = info.fingerprint if info else ""
        self._ids += event.token_ids
        self._failures = 0
        if self._lost_at is not None:
            logger.info(
                "an answer goes on at another node",
                extra={
                    **self._log_fields,
                    "peer": self._attempt.node_id,
                    "pause_ms": round((now - self._lost_at) * 1000, 3),
                },
            )
            self._lost_at = None

    # Opening.

    async def _open_next(self) -> None:
        """Open the best node. Raises what ends the stream."""
        since = trio.current_time()
        while True:
            request, view = self._request_now(), self._attempts.view()
            try:
                attempt = await self._try(view, self._excluded_now(view), request, since)
            except AttemptFailed as failed:
                if self._is_final(failed.error):
                    raise failed.error from None
                self._note_failure(failed.member, failed.error)
            except (NoCapacity, ModelUnknown) as exc:
                if not self._has_begun:
                    # A client that comes back is known by what the router promised here, not by a peer's word. Where
                    # the nodes that have the model are gone since they refused it, it may come back all the same.
                    fault = self._fault_of_all(view)
                    self._trace_no_route(fault or exc, since)
                    if fault is not None:
                        raise fault from None
                    raise exc if isinstance(exc, NoCapacity) else self._refusal or exc from None
                if not self._may_hope(view):
                    self._trace_no_route(exc, since)
                    raise self._given_up() from exc
                await trio.sleep(RETRY_INTERVAL_S)
                continue
            else:
                self._take(attempt)
                return
            since = trio.current_time()
            if self._failures >= TRIES_MAX and not self._has_begun:
                if self._refusal is not None:
                    raise self._attempts.refused(view, self._route_now(self._excluded_now(view)))
                raise GenerationFailed(f"{self._failures} nodes were tried and none could serve the request")

    async def _try(self, view: ClusterView, exclude: frozenset[str], request: GenerateRequest, since: float) -> Attempt:
        """since: when the search for a node began. Raises as Attempts.open does."""
        self._attempts_made += 1
        try:
            attempt = await self._attempts.open(
                view,
                self._route_now(exclude),
                request,
                since=since,
                number=self._attempts_made,
                after=self._latest_span,
            )
        except AttemptFailed as failed:
            self._latest_span = None if failed.member.is_self else failed.trace
            raise
        except (NoCapacity, ModelUnknown):
            self._attempts_made -= 1  # nobody was asked
            raise
        self._latest_span = None if attempt.is_local else attempt.span.context
        return attempt

    def _trace_no_route(self, error: Failure, since: float) -> None:
        trace_route(self._attempts.tracer, self._request.trace, (), since=since, error=type(error).__name__)

    async def _move(self, reason: Reason) -> None:
        """Go on elsewhere, or stay where nobody takes it. The former node works until then."""
        former = self._attempt
        assert former is not None
        view = self._attempts.view()
        exclude = self._excluded_now(view) | {former.node_id}
        try:
            attempt = await self._try(view, exclude, self._request_now(), trio.current_time())
        except (AttemptFailed, NoCapacity, ModelUnknown) as exc:
            self._interruption = None
            extra = {"peer": former.node_id, "error.message": str(exc), "reason": reason}
            logger.info("an answer stays where it is", extra=self._log_fields | extra)
            return
        self._note_loss(reason)
        self._excluded.add(former.member, EXCLUDED_S, trio.current_time())
        self._take(attempt)
        await former.close(reason)

    def _take(self, attempt: Attempt) -> None:
        self._attempt, self._interruption = attempt, None
        self._attempts.counts.resumed_tokens += len(self._ids)
        if self.path:
            move = Move("failover" if self._has_begun else "retry", self.node_id, attempt.node_id, self._loss)
            self.moves.append(move)
            self._attempts.on_move(move)
        self._loss = ""
        self.path.append(attempt.node_id)

    def _request_now(self) -> GenerateRequest:
        """Raises DeadlineExceeded."""
        remaining_s = self._deadline - trio.current_time()
        if remaining_s <= 0:
            raise self._too_late()
        return replace(
            self._request, deadline_s=remaining_s, generated_ids=tuple(self._ids), fingerprint=self._fingerprint
        )

    def _route_now(self, exclude: frozenset[str]) -> RouteRequest:
        return replace(
            self._route,
            exclude=exclude,
            fingerprint=self._fingerprint,
            is_resumed=bool(self._ids),
            was_refused=self._refusal is not None and not self._has_begun,  # an answer is not told to come back
        )

    # Failing.

    def _is_final(self, error: Failure) -> bool:
        """No other node would do better: it is too late, or the client's own fault. An answer that has begun was no
        fault of the client's; such a node has less room, or another version."""
        return isinstance(error, DeadlineExceeded) or (isinstance(error, RequestInvalid) and not self._ids)

    def _note_failure(self, member: MemberView, error: Failure) -> None:
        self._failures += 1
        self._last_failure = (member.node_id, error)
        self._has_only_faults &= isinstance(error, GenerationFailed)
        self._blame(member, error)
        self._note_loss(_reason(error), type(error).__name__)
        logger.log(
            logging.INFO if isinstance(error, GenerationMoved) else logging.WARNING,
            "a node did not serve a request",
            extra={
                **self._log_fields,
                "peer": member.node_id,
                "reason": type(error).__name__,
                "error.message": str(error),
                "completion_tokens": len(self._ids),
            },
        )

    def _blame(self, member: MemberView, error: Failure) -> None:
        """Leave the node out for a while."""
        if isinstance(error, NoCapacity):
            self._refusal = error
        seconds = EXCLUDED_FULL_S if isinstance(error, NoCapacity) else EXCLUDED_S
        self._excluded.add(member, seconds, trio.current_time())
        if isinstance(error, PeerUnavailable):
            self._attempts.peer_failed(member.node_id)

    def _note_loss(self, reason: str, kind: str = "") -> None:
        self._loss = self._loss or reason
        if not self._has_begun:
            self._attempts.counts.retries[kind or reason] += 1
        elif self._lost_at is None:
            self._lost_at = trio.current_time()
            self._attempts.counts.failovers[reason] += 1
            self.failovers += 1

    def _excluded_now(self, view: ClusterView) -> frozenset[str]:
        return self._excluded.ids(view, trio.current_time())

    def _may_hope(self, view: ClusterView) -> bool:
        """Some node may yet become one that goes on: it is full, excluded for now, suspect, or loads."""
        assert self._lost_at is not None
        if trio.current_time() - self._lost_at > PATIENCE_S:
            return False
        return any(
            member.status in (MemberStatus.ALIVE, MemberStatus.SUSPECT)
            and member.load.readiness in (Readiness.READY, Readiness.LOADING)
            and (info := member.model(self._request.model)) is not None
            and info.fingerprint in ("", self._fingerprint)
            for member in view.members.values()
        )

    def _fault_of_all(self, view: ClusterView) -> GenerationFailed | None:
        """Where every node that could serve the request broke it: it is not room that is wanting."""
        if not self._has_only_faults or self._last_failure is None:
            return None
        if others_left(view, self._request.model, self._excluded_now(view)):
            return None
        node_id, error = self._last_failure
        return GenerationFailed(f"{node_id} could not serve the request ({error}), and no other node is left to try")

    def _given_up(self) -> GenerationFailed:
        node_id, error = self._last_failure or (self.node_id, None)
        return GenerationFailed(
            f"{node_id} failed in the middle of the answer ({_reason(error)}), and no other node could go on with it: "
            f"none has the same model {self._request.model!r} ready; send the request again"
        )

    def _too_late(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"the request's deadline of {self._request.deadline_s:g} s has passed")


def _reason(error: Failure | None) -> str:
    """The label under which a failover is counted."""
    match error:
        case PeerUnavailable():
            return "link"
        case GenerationMoved():
            return "drain"
        case NoCapacity():
            return "refused"
    return "fault"
