"""What is sampled and recorded, when it begins and ends, and what it costs where it is not."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import trio
import trio.testing
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanKind, StatusCode

from observability.sdk_tracer import DRIFT_NS_MAX, NS_PER_S, SdkTracer
from observability.trace_context import TraceContext
from observability.tracing import NO_TRACING, Tracer, log_fields
from tests.unit.memory_spans import CALLER, MemorySpans, id_of, parent_of, seconds, trace_of

UNSAMPLED = replace(CALLER, flags=0)


async def test_a_sampled_callers_trace_goes_on() -> None:
    spans = MemorySpans(sample_ratio=0.0)
    caller = replace(CALLER, state="vendor=abc")
    request = spans.tracer.request("POST /v1/x", caller, {"a": 1})
    assert request.is_recording
    assert request.context is not None
    assert (request.context.trace_id, request.context.state) == (CALLER.trace_id, "vendor=abc")
    spans.tracer.span("forward", request.context, {"b": "x"}, kind="client", link=caller).end()
    request.end()
    forward, root = spans.ended
    assert (trace_of(root), parent_of(root), root.kind, root.attributes) == (
        CALLER.trace_id,
        CALLER.span_id,
        SpanKind.SERVER,
        {"a": 1},
    )
    assert (parent_of(forward), forward.kind) == (id_of(root), SpanKind.CLIENT)
    assert [f"{link.context.span_id:016x}" for link in forward.links] == [CALLER.span_id]


async def test_a_caller_that_does_not_sample_decides_that() -> None:
    spans = MemorySpans(sample_ratio=1.0)
    request = spans.tracer.request("r", UNSAMPLED, {})
    assert (request.is_recording, request.context) == (False, UNSAMPLED)
    child = spans.tracer.span("c", request.context, {})
    child.set({"a": 1})
    child.end("Error")
    request.end()
    assert spans.ended == []


@pytest.mark.parametrize(("ratio", "least", "most"), [(0.0, 0, 0), (0.25, 60, 140), (1.0, 400, 400)])
async def test_of_requests_without_a_caller_a_share_begins_a_trace(ratio: float, least: int, most: int) -> None:
    spans = MemorySpans(ratio)
    requests = [spans.tracer.request("r", None, {}) for _ in range(400)]
    begun = [request.context for request in requests if request.context is not None]
    assert least <= len(begun) <= most
    assert len({context.trace_id for context in begun}) == len(begun)
    assert all(context.is_sampled for context in begun)


@pytest.mark.parametrize("trace", [None, UNSAMPLED])
def test_the_tracer_that_is_off_passes_the_callers_context_on(trace: TraceContext | None) -> None:
    for span in (NO_TRACING.request("r", trace, {}), NO_TRACING.span("s", trace, {}, kind="client")):
        span.set({"a": 1})
        span.end()
        assert (span.is_recording, span.context) == (False, trace)
    assert NO_TRACING.statistics().exported == 0


async def test_times_are_those_given_or_now(autojump_clock: trio.testing.MockClock) -> None:
    spans = MemorySpans()
    await trio.sleep(10)
    span = spans.tracer.request("r", None, {}, start=7.0)
    await trio.sleep(2)
    span.end()
    spans.tracer.request("s", None, {}, start=1.0).end(at=4.5)
    assert [seconds(ended) for ended in spans.ended] == [(7.0, 12.0), (1.0, 4.5)]


class Clocks:
    """Of spans, seconds, and of the wall, nanoseconds; gap_s: passes with each reading of the spans'."""

    def __init__(self) -> None:
        self.now_s, self.wall_ns, self.gap_s = 1.0, 5 * NS_PER_S, 0.0

    def now(self) -> float:
        self.now_s += self.gap_s
        return self.now_s

    def tracer(self, found: MemorySpans) -> SdkTracer:
        return SdkTracer(found.provider, 1.0, rng=random.Random(1), now=self.now, wall_ns=lambda: self.wall_ns)


def started_ns(clocks: Clocks, found: MemorySpans, tracer: SdkTracer) -> int:
    tracer.request("r", None, {}, start=clocks.now_s).end(at=clocks.now_s)
    assert found.ended[-1].start_time is not None
    return found.ended[-1].start_time


def test_an_instant_is_one_number_until_the_clocks_have_drifted_apart() -> None:
    clocks, found = Clocks(), MemorySpans()
    tracer = clocks.tracer(found)
    assert started_ns(clocks, found, tracer) == 5 * NS_PER_S
    clocks.wall_ns += DRIFT_NS_MAX // 2
    assert started_ns(clocks, found, tracer) == 5 * NS_PER_S
    clocks.wall_ns += DRIFT_NS_MAX
    assert started_ns(clocks, found, tracer) == clocks.wall_ns


def test_a_wall_clock_that_is_set_back_ends_no_span_before_its_beginning() -> None:
    clocks, found = Clocks(), MemorySpans()
    tracer = clocks.tracer(found)
    span = tracer.request("r", None, {})
    clocks.wall_ns -= 2 * NS_PER_S
    clocks.now_s += 0.5
    tracer.request("another", None, {}).end()
    span.end()
    ended = found.named("r")[0]
    assert ended.start_time is not None
    assert ended.end_time == ended.start_time + NS_PER_S // 2


def test_clocks_between_which_another_thread_ran_are_not_compared() -> None:
    clocks, found = Clocks(), MemorySpans()
    tracer = clocks.tracer(found)
    assert started_ns(clocks, found, tracer) == 5 * NS_PER_S
    clocks.gap_s = 0.01
    clocks.wall_ns += 3 * DRIFT_NS_MAX
    at = clocks.now_s
    tracer.request("s", None, {}, start=at).end(at=at)
    assert found.named("s")[0].start_time == 5 * NS_PER_S + round((at - 1.0) * NS_PER_S)


async def test_an_error_is_its_type_and_the_first_end_counts() -> None:
    spans = MemorySpans()
    span = spans.tracer.request("r", None, {})
    span.end("PeerUnavailable")
    span.set({"late": True})
    span.end()
    (ended,) = spans.ended
    assert ended.status.status_code is StatusCode.ERROR
    assert ended.status.description == "PeerUnavailable"
    assert ended.attributes == {"error.type": "PeerUnavailable"}


async def test_no_context_variable_makes_a_span_a_child() -> None:
    spans = MemorySpans()
    provider = TracerProvider(shutdown_on_exit=False)
    with provider.get_tracer("other").start_as_current_span("ambient"):
        spans.tracer.request("r", None, {}).end()
    assert parent_of(spans.ended[0]) == ""


def test_log_lines_have_the_trace_where_there_is_one() -> None:
    assert log_fields(None) == {}
    assert log_fields(CALLER) == {"trace_id": CALLER.trace_id}


def test_both_tracers_are_one_protocol() -> None:
    tracers: list[Tracer] = [NO_TRACING, MemorySpans().tracer]
    assert all(tracer.statistics().dropped_queue == 0 for tracer in tracers)
