"""Spans of requests as their makers see them: begun under a context, ended once. Nothing is kept in context variables,
because a stream's reader may be another task than the one that opened it.

While nothing is recorded a span is an object that does nothing and passes the caller's context on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from observability.trace_context import TraceContext

Value = str | int | float | bool | Sequence[str]
Kind = Literal["internal", "server", "client"]


@dataclass(frozen=True, slots=True)
class TracingStatistics:
    """Totals of spans: sent to the collector, lost to a full queue, lost because the collector did not take them."""

    exported: int = 0
    dropped_queue: int = 0
    dropped_export: int = 0


class Span(Protocol):
    """One piece of work. Times are on the tracer's clock, which is trio's."""

    @property
    def is_recording(self) -> bool:
        """False: nothing of it is kept, and what is only for it need not be computed."""
        ...

    @property
    def context(self) -> TraceContext | None:
        """What work below it is opened under, here and at peers; None where there is no trace."""
        ...

    def set(self, attributes: Mapping[str, Value]) -> None: ...

    def end(self, error: str = "", *, at: float | None = None) -> None:
        """error: the type of what went wrong; never a message, which may quote a prompt. at: None is now. The first
        call counts."""
        ...


class Tracer(Protocol):
    """Begins spans. Costs next to nothing while they are not recorded; never raises."""

    def request(
        self,
        name: str,
        caller: TraceContext | None,
        attributes: Mapping[str, Value],
        *,
        start: float | None = None,
    ) -> Span:
        """A client's request. caller: of its traceparent, whose decision whether to sample stands. Without one the
        tracer decides, and begins a trace."""
        ...

    def span(
        self,
        name: str,
        parent: TraceContext | None,
        attributes: Mapping[str, Value],
        *,
        kind: Kind = "internal",
        start: float | None = None,
        link: TraceContext | None = None,
    ) -> Span:
        """Work below a request; recorded where the parent is sampled. start: None is now. link: another span that this
        one follows from."""
        ...

    def statistics(self) -> TracingStatistics: ...


class UnrecordedSpan:
    """Of a trace that is not sampled, or none."""

    __slots__ = ("_context",)

    def __init__(self, context: TraceContext | None) -> None:
        self._context = context

    @property
    def is_recording(self) -> bool:
        return False

    @property
    def context(self) -> TraceContext | None:
        return self._context

    def set(self, attributes: Mapping[str, Value]) -> None:
        pass

    def end(self, error: str = "", *, at: float | None = None) -> None:
        pass


_NO_SPAN = UnrecordedSpan(None)


def unrecorded(context: TraceContext | None) -> Span:
    """A span that passes the context on and nothing else."""
    return _NO_SPAN if context is None else UnrecordedSpan(context)


class NoTracing:
    """The Tracer of a node that does not trace."""

    def request(
        self, name: str, caller: TraceContext | None, attributes: Mapping[str, Value], *, start: float | None = None
    ) -> Span:
        return unrecorded(caller)

    def span(
        self,
        name: str,
        parent: TraceContext | None,
        attributes: Mapping[str, Value],
        *,
        kind: Kind = "internal",
        start: float | None = None,
        link: TraceContext | None = None,
    ) -> Span:
        return unrecorded(parent)

    def statistics(self) -> TracingStatistics:
        return TracingStatistics()


NO_TRACING = NoTracing()


def log_fields(context: TraceContext | None) -> dict[str, str]:
    """What a log line of the request says of its trace."""
    return {} if context is None else {"trace_id": context.trace_id}
