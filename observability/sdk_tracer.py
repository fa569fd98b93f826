"""The Tracer that records, with OpenTelemetry's SDK, which the optional extra `tracing` brings.

Who decides what is sampled: a caller that sent a traceparent, else a share of the requests, drawn here. So everything
the SDK is asked for is recorded, and what is not sampled never reaches it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping

import trio
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)
from opentelemetry.trace import Span as SdkSpan

from observability.trace_context import TraceContext, parse_trace_context
from observability.tracing import Kind, Span, TracingStatistics, Value, unrecorded

NS_PER_S = 1_000_000_000
DRIFT_NS_MAX = 5_000_000  # what nodes' clocks differ by anyway, even where they are kept well
# Both clocks are read one after the other: with more between them another thread was let in, and they say nothing.
READING_S_MAX = 0.0005
_KINDS = {"internal": SpanKind.INTERNAL, "server": SpanKind.SERVER, "client": SpanKind.CLIENT}


class SdkTracer:
    """provider: samples everything. sample_ratio: of the requests that come without a traceparent. now: the clock of
    the spans' times; wall_ns: what they are exported in, nanoseconds since 1970."""

    def __init__(
        self,
        provider: TracerProvider,
        sample_ratio: float,
        *,
        rng: random.Random,
        statistics: Callable[[], TracingStatistics] = TracingStatistics,
        now: Callable[[], float] = trio.current_time,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.statistics = statistics
        self._tracer = provider.get_tracer("ai_cluster")
        self._sample_ratio = sample_ratio
        self._rng = rng
        self._now = now
        self._wall_ns = wall_ns
        self._offset_ns = 0  # of the wall clock to the spans'

    def request(
        self, name: str, caller: TraceContext | None, attributes: Mapping[str, Value], *, start: float | None = None
    ) -> Span:
        if caller is None:
            if self._rng.random() >= self._sample_ratio:
                return unrecorded(None)
        elif not caller.is_sampled:
            return unrecorded(caller)
        return self._begin(name, caller, attributes, SpanKind.SERVER, start, None)

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
        if parent is None or not parent.is_sampled:
            return unrecorded(parent)
        return self._begin(name, parent, attributes, _KINDS[kind], start, link)

    def _begin(
        self,
        name: str,
        parent: TraceContext | None,
        attributes: Mapping[str, Value],
        kind: SpanKind,
        start: float | None,
        link: TraceContext | None,
    ) -> Span:
        # An empty context, where there is no parent: never whatever the task's context variables hold.
        context = Context()
        if parent is not None:
            context = set_span_in_context(NonRecordingSpan(_sdk_context(parent)), context)
        offset_ns = self._offset()
        span = self._tracer.start_span(
            name,
            context,
            kind,
            attributes,
            links=() if link is None else (Link(_sdk_context(link)),),
            start_time=self._wall(start, offset_ns),
            record_exception=False,
            set_status_on_exception=False,
        )
        if not span.is_recording():  # OTEL_SDK_DISABLED
            return unrecorded(parent)
        return _RecordedSpan(span, lambda at: self._wall(at, offset_ns))

    def _offset(self) -> int:
        """Of the wall clock to the spans', nanoseconds: the same until they have drifted DRIFT_NS_MAX apart, so that
        phases join exactly. A span keeps the one it began with, or a wall clock that is set would end it before."""
        before, wall_ns, after = self._now(), self._wall_ns(), self._now()
        offset_ns = wall_ns - round(before * NS_PER_S)
        is_sound = after - before <= READING_S_MAX or self._offset_ns == 0
        if is_sound and abs(offset_ns - self._offset_ns) > DRIFT_NS_MAX:
            self._offset_ns = offset_ns
        return self._offset_ns

    def _wall(self, at: float | None, offset_ns: int) -> int:
        """Nanoseconds since 1970 of an instant on the spans' clock; None is now."""
        return round((self._now() if at is None else at) * NS_PER_S) + offset_ns


class _RecordedSpan:
    """wall: an instant on the spans' clock in nanoseconds since 1970."""

    __slots__ = ("_context", "_span", "_wall")

    def __init__(self, span: SdkSpan, wall: Callable[[float | None], int]) -> None:
        self._span = span
        self._wall = wall
        self._context = _own_context(span.get_span_context())

    @property
    def is_recording(self) -> bool:
        return self._span.is_recording()

    @property
    def context(self) -> TraceContext | None:
        return self._context

    def set(self, attributes: Mapping[str, Value]) -> None:
        if self._span.is_recording():
            self._span.set_attributes(attributes)

    def end(self, error: str = "", *, at: float | None = None) -> None:
        if not self._span.is_recording():
            return
        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end(self._wall(at))


def _sdk_context(context: TraceContext) -> SpanContext:
    return SpanContext(
        int(context.trace_id, 16),
        int(context.span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(context.flags),
        trace_state=TraceState.from_header([context.state] if context.state else []),
    )


def _own_context(context: SpanContext) -> TraceContext | None:
    flags = int(context.trace_flags)
    return parse_trace_context(
        f"00-{context.trace_id:032x}-{context.span_id:016x}-{flags:02x}", context.trace_state.to_header()
    )
