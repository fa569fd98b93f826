"""A tracer whose spans stay in memory, on trio's clock: an instant of the clock is that many seconds since 1970."""

from __future__ import annotations

import random

import trio
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

from observability.sdk_tracer import NS_PER_S, SdkTracer
from observability.trace_context import SAMPLED, TraceContext

CALLER = TraceContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", SAMPLED)


class MemorySpans:
    """Ended spans, in the order in which they ended."""

    def __init__(self, sample_ratio: float = 1.0) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = provider = TracerProvider(sampler=ALWAYS_ON, shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = SdkTracer(
            provider, sample_ratio, rng=random.Random(3), wall_ns=lambda: round(trio.current_time() * NS_PER_S)
        )

    @property
    def ended(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def names(self) -> list[str]:
        return [span.name for span in self.ended]

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.ended if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span


def id_of(span: ReadableSpan) -> str:
    return f"{span.get_span_context().span_id:016x}"


def parent_of(span: ReadableSpan) -> str:
    """Empty for a root."""
    return "" if span.parent is None else f"{span.parent.span_id:016x}"


def trace_of(span: ReadableSpan) -> str:
    return f"{span.get_span_context().trace_id:032x}"


def seconds(span: ReadableSpan) -> tuple[float, float]:
    """Its start and end on the clock."""
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time / NS_PER_S, span.end_time / NS_PER_S
