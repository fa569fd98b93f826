"""Opens one generation on one node, the best that there is; keeps the books of all such tries.

What is to be done when one fails is decided by its caller.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import trio

from mesh.errors import MeshError, NoCapacity
from mesh.router import OwnDispatch, Router, RouteRequest
from mesh.view import ClusterView, MemberView
from nodes.failover_budget import FailoverBudget
from nodes.generation import GenerateEvent, GenerateRequest, GenerationError, GenerationFailed, Generator
from nodes.span_ends import CANCELLED, end_with
from nodes.witness import Witness
from observability.trace_context import TraceContext
from observability.tracing import Span, Tracer, Value, unrecorded

# Times to first token of one model, whose 99th percentile says which one is late; with fewer none is.
FIRST_TOKENS = 512
FIRST_TOKENS_MIN = 100
# The one reason to leave a node in mid-answer that is the node's fault.
HANG = "hang"
# Models whose times are kept. Only names that a node serves come here.
MODELS_MAX = 256


@dataclass(frozen=True, slots=True)
class Move:
    """An answer's way from one node to another. failover: it had begun; retry: it had not; hedge: its first token was
    late, and was asked of a second node too. reason: what ended it at the first one."""

    kind: Literal["failover", "retry", "hedge"]
    origin: str
    target: str
    reason: str


class AttemptFailed(Exception):
    """The node did not take the request."""

    def __init__(
        self, member: MemberView, error: MeshError | GenerationError, trace: TraceContext | None = None
    ) -> None:
        """trace: of the attempt's span."""
        super().__init__(str(error))
        self.member = member
        self.error = error
        self.trace = trace


@dataclass(slots=True, eq=False)
class Attempt:
    """One generation at one node, open until close(). member: the node as it was seen when this was opened. span: of
    the way to a peer; unrecorded for this node itself."""

    member: MemberView
    stream: trio.abc.ReceiveChannel[GenerateEvent]
    router: Router
    entry: OwnDispatch
    span: Span
    has_finished: bool = False

    @property
    def node_id(self) -> str:
        return self.member.node_id

    @property
    def is_local(self) -> bool:
        return self.member.is_self

    async def receive(self) -> GenerateEvent:
        """The next event. Raises what the stream does, and GenerationFailed where it ends without a finish_reason."""
        try:
            event = await self.stream.receive()
        except trio.EndOfChannel:
            if self.has_finished:
                raise
            failure = GenerationFailed(f"{self.node_id} ended the stream without finishing it")
            end_with(self.span, failure)
            raise failure from None
        except Exception as exc:
            end_with(self.span, exc)
            raise
        if event.finish_reason is not None:
            self.has_finished = True
            if self.span.is_recording:
                self.span.set(answer_attributes(event))
                self.span.end()
        return event

    async def close(self, reason: str = CANCELLED) -> None:
        """Cancels what has not finished. Any number of times. reason: why nobody waits for it, for its span."""
        self.router.finished(self.entry)
        if self.span.is_recording:
            if not self.has_finished:
                self.span.set({"ai_cluster.outcome": reason})
            self.span.end(reason if reason == HANG else "")
        await self.stream.aclose()


@dataclass(slots=True)
class AttemptCounts:
    """Totals.

    forwards: generations opened on a peer. retries: moves of a request to its next candidate before its first token, by
    what failed. failovers: moves of an answer that had begun, by what ended it (link, fault, hang, drain, refused).
    resumed_tokens: of answers so far, given to another node to go on from. lost: answers that could not go on.
    hedges: second openings of late requests, by who was first (first, second, none). hedge_tokens: prompt tokens
    computed a second time for them, and tokens thrown away. probes: of degraded nodes, by outcome (served, failed).
    """

    forwards: int = 0
    retries: Counter[str] = field(default_factory=Counter)
    failovers: Counter[str] = field(default_factory=Counter)
    resumed_tokens: int = 0
    lost: int = 0
    hedges: Counter[str] = field(default_factory=Counter)
    hedge_tokens: int = 0
    probes: Counter[str] = field(default_factory=Counter)


class Attempts:
    """view: the cluster with what is in `witness`, this node's own row as of now. local: this node's engines. remote:
    makes the Generator of a peer. peer_failed is told the node id whenever a peer failed a request, so that gossip
    probes it at once. hedges: a request whose first token is late may be opened on a second node. on_move is told of
    every move, when the second node has taken the request. tracer: of the ways to nodes."""

    def __init__(
        self,
        *,
        view: Callable[[], ClusterView],
        router: Router,
        local: Generator,
        remote: Callable[[MemberView], Generator],
        peer_failed: Callable[[str], None],
        hedges: bool,
        on_move: Callable[[Move], None],
        tracer: Tracer,
    ) -> None:
        self.counts = AttemptCounts()
        self.witness = Witness()
        self.peer_failed = peer_failed
        self.on_move = on_move
        self._budget = FailoverBudget()
        self.view = view
        self._router = router
        self._local = local
        self._remote = remote
        self._hedges = hedges
        self.tracer = tracer
        self._first_tokens: dict[str, deque[float]] = {}

    def generator(self, member: MemberView) -> Generator:
        return self._local if member.is_self else self._remote(member)

    async def open(
        self,
        view: ClusterView,
        route: RouteRequest,
        request: GenerateRequest,
        *,
        since: float | None = None,
        number: int = 1,
        after: TraceContext | None = None,
    ) -> Attempt:
        """Open the request on the best node. since: when the search for it began; None is now. number: of the attempt;
        after: the span of the one before it. Raises ModelUnknown or NoCapacity where there is none to be asked, and
        AttemptFailed where it did not take the request."""
        started = trio.current_time()
        order = self._router.rank(view, route, started)
        node_id = order[0]
        member = view.members[node_id]
        trace_route(
            self.tracer, request.trace, order, self._router.latest_estimate_s, since=started if since is None else since
        )
        # Counted before anything is awaited, so that requests of the same instant see each other.
        entry = self._router.dispatched(
            node_id,
            route.model,
            route.prompt_bytes,
            member.load_version,
            blocks=route.blocks,
            generation=member.generation,
        )
        hops = request.hops if member.is_self else request.hops + 1
        resumed_tokens = len(request.generated_ids)
        span = forward_span(self.tracer, request.trace, member, request.model, number, resumed_tokens, after)
        try:
            stream = await self.generator(member).open(replace(request, hops=hops, trace=span.context))
        except BaseException as exc:
            self._router.finished(entry)
            end_with(span, exc)
            if isinstance(exc, MeshError | GenerationError):
                raise AttemptFailed(member, exc, span.context) from exc
            raise
        if member.is_self:
            self._router.opened(entry)  # from now on the own row of the view contains it
        self.counts.forwards += not member.is_self
        return Attempt(member, stream, self._router, entry, span)

    def refused(self, view: ClusterView, route: RouteRequest) -> NoCapacity:
        """What to tell a client whose request the nodes tried (route.exclude) had no place for, as open() does."""
        return self._router.refused(view, route, trio.current_time())

    def take_from_budget(self, running: int) -> bool:
        """True where one more stream may be opened elsewhere on a guess. running: streams open here."""
        return self._budget.take(running, trio.current_time())

    def note_first_token(self, model: str, seconds: float) -> None:
        times = self._first_tokens.get(model)
        if times is None:
            if len(self._first_tokens) >= MODELS_MAX:
                del self._first_tokens[next(iter(self._first_tokens))]
            times = self._first_tokens[model] = deque(maxlen=FIRST_TOKENS)
        times.append(seconds)

    def late_after_s(self, model: str) -> float | None:
        """After how long a first token is late: the 99th percentile of the last ones. None where nothing is hedged."""
        times = self._first_tokens.get(model)
        if not self._hedges or times is None or len(times) < FIRST_TOKENS_MIN:
            return None
        return sorted(times)[len(times) * 99 // 100]


def trace_route(
    tracer: Tracer,
    trace: TraceContext | None,
    order: Sequence[str],
    estimate_s: float = 0.0,
    *,
    since: float,
    error: str = "",
) -> None:
    """The choice of a node, from the beginning of the search for it until now. order: as the router ranked them; empty
    where there was none, for which error is the reason."""
    if trace is not None and trace.is_sampled:
        attributes: dict[str, Value] = {"ai_cluster.route.candidates": len(order)}
        if order:
            attributes["ai_cluster.route.node"] = order[0]
            attributes["ai_cluster.route.estimate_ms"] = round(estimate_s * 1000, 3)
        tracer.span("route", trace, attributes, start=since).end(error)


def forward_span(
    tracer: Tracer,
    trace: TraceContext | None,
    member: MemberView,
    model: str,
    number: int,
    resumed_tokens: int,
    after: TraceContext | None,
) -> Span:
    """The way to a peer and back; for this node itself what passes the context on. The arguments are as Attempts.open
    has them. resumed_tokens: of the answer so far."""
    if trace is None or not trace.is_sampled or member.is_self:
        return unrecorded(trace)
    attributes: dict[str, Value] = {
        "gen_ai.request.model": model,
        "server.address": member.address.host,
        "server.port": member.address.port,
        "ai_cluster.peer": member.node_id,
        "ai_cluster.attempt": number,
        "ai_cluster.resumed_tokens": resumed_tokens,
    }
    return tracer.span("forward", trace, attributes, kind="client", link=after)


def answer_attributes(last: GenerateEvent) -> dict[str, Value]:
    """What spans of an answer say of its end."""
    found: dict[str, Value] = {"gen_ai.response.finish_reasons": (str(last.finish_reason),)}
    if last.usage is not None:
        found |= {
            "gen_ai.usage.input_tokens": last.usage.prompt_tokens,
            "gen_ai.usage.output_tokens": last.usage.completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": last.usage.cached_tokens,
        }
    return found
