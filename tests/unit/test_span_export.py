"""Spans on their way to a collector that takes, refuses, breaks or hangs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from observability import span_export
from observability.sdk_tracer import SdkTracer
from observability.span_export import (
    BATCH_SPANS_MAX,
    FAILURE_LOG_INTERVAL_S,
    QUEUE_SPANS_MAX,
    VALUE_CHARS_MAX,
    SpanPipeline,
    open_pipeline,
    pipeline_tracer,
)
from observability.tracing import TracingStatistics
from tests.otlp_receiver import otlp_receiver
from tests.unit.memory_spans import CALLER

WAIT_S = 30.0


class Collector(SpanExporter):
    """Does with each batch what it is told to."""

    def __init__(self, act: Callable[[], SpanExportResult] = lambda: SpanExportResult.SUCCESS) -> None:
        self.act = act
        self.taken = 0
        self.has_begun = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.taken += len(spans)
        self.has_begun.set()
        return self.act()

    def shutdown(self) -> None:
        pass


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """What a hanging collector waits for; set at the end, so that no thread is left."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture(autouse=True)
def sdk_logging() -> Iterator[None]:
    sdk = logging.getLogger("opentelemetry")
    before = sdk.handlers[:], sdk.propagate
    yield
    sdk.handlers[:], sdk.propagate = before


def traced(pipeline: SpanPipeline) -> SdkTracer:
    tracer = pipeline_tracer(pipeline, sample_ratio=1.0, service_name="s", node_id="n", version="1")
    tracer._now = lambda: 0.0  # outside trio
    return tracer


def end_spans(tracer: SdkTracer, count: int) -> None:
    for _ in range(count):
        tracer.span("s", CALLER, {}).end()


def test_what_the_collector_took_is_counted() -> None:
    collector = Collector()
    pipeline = SpanPipeline(collector)
    end_spans(traced(pipeline), 3)
    pipeline.close(WAIT_S)
    assert collector.taken == 3
    assert pipeline.statistics() == TracingStatistics(3, 0, 0)


def test_a_collector_that_hangs_fills_the_queue_and_holds_up_nothing(
    released: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    def hang() -> SpanExportResult:
        released.wait()
        return SpanExportResult.SUCCESS

    collector = Collector(hang)
    pipeline = SpanPipeline(collector)
    tracer = traced(pipeline)
    end_spans(tracer, BATCH_SPANS_MAX)
    assert collector.has_begun.wait(WAIT_S)
    end_spans(tracer, QUEUE_SPANS_MAX + 5)
    assert pipeline.statistics() == TracingStatistics(0, 5, 0)
    pipeline.close(timeout_s=0.01)
    line = caplog.records[-1]
    assert line.message == "spans were not exported before the end"
    assert line.__dict__["count"] == BATCH_SPANS_MAX + QUEUE_SPANS_MAX


@pytest.mark.parametrize("kind", ["refuses", "breaks"])
def test_a_collector_that_fails_is_told_of_once_a_while_and_when_it_is_back(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "observability")
    now = [100.0]

    def fail() -> SpanExportResult:
        if kind == "breaks":
            raise ConnectionError("secret")
        logging.getLogger("opentelemetry.exporter.x").error("Failed to export, code: %s", 503)
        return SpanExportResult.FAILURE

    sender = span_export._Sender(collector := Collector(fail), lambda: now[0])
    span = object()
    for _ in range(3):
        assert sender.export([span, span]) is SpanExportResult.FAILURE  # type: ignore[list-item]
    now[0] += FAILURE_LOG_INTERVAL_S
    sender.export([span])  # type: ignore[list-item]
    collector.act = lambda: SpanExportResult.SUCCESS
    sender.export([span])  # type: ignore[list-item]
    assert (sender.exported, sender.lost) == (1, 7)
    told = [(record.message.split(";")[0], record.__dict__["count"]) for record in caplog.records]
    assert told == [
        ("spans could not be exported", 2),
        ("spans could not be exported", 7),
        ("spans are exported again", 7),
    ]
    reason = caplog.records[0].__dict__["reason"]
    assert reason == ("ConnectionError" if kind == "breaks" else "Failed to export, code: 503")


def test_the_reason_is_what_the_sdk_said_of_its_tries_and_not_its_summary(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> SpanExportResult:
        sdk = logging.getLogger("opentelemetry.exporter.x")
        sdk.warning("Transient error connection refused encountered, retrying")
        sdk.error("Failed to export spans batch due to timeout, max retries or shutdown.")
        return SpanExportResult.FAILURE

    sender = span_export._Sender(Collector(fail), lambda: 0.0)
    sender.export([object()])  # type: ignore[list-item]
    assert caplog.records[0].__dict__["reason"] == "Transient error connection refused encountered, retrying"


def test_spans_lost_since_the_last_word_of_it_are_told_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    collector = Collector(lambda: SpanExportResult.FAILURE)
    pipeline = SpanPipeline(collector)
    pipeline._sender.export([object()])  # type: ignore[list-item]
    pipeline._queued = 1  # as if it had come by the queue
    end_spans(traced(pipeline), 3)
    pipeline.close(WAIT_S)
    told = [(record.message.split(";")[0], record.__dict__["count"]) for record in caplog.records]
    assert told == [("spans could not be exported", 1), ("spans were not exported before the end", 3)]


def test_spans_reach_a_collector_over_http_with_its_headers() -> None:
    with otlp_receiver() as receiver:
        pipeline = open_pipeline(f"{receiver.endpoint}/v1/traces", {"authorization": "Basic abc"})
        end_spans(traced(pipeline), 2)
        pipeline.close(WAIT_S)
    assert [(span.service, span.node, span.parent_id) for span in receiver.spans] == [("s", "n", CALLER.span_id)] * 2
    assert receiver.headers[0]["authorization"] == "Basic abc"
    assert pipeline.statistics().exported == 2


def test_a_value_that_a_client_chose_is_cut() -> None:
    kept: list[ReadableSpan] = []

    class Keeping(Collector):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            kept.extend(spans)
            return SpanExportResult.SUCCESS

    pipeline = SpanPipeline(Keeping())
    traced(pipeline).span("s", CALLER, {"gen_ai.request.model": "x" * 100_000}).end()
    pipeline.close(WAIT_S)
    (span,) = kept
    assert span.attributes is not None
    assert span.attributes["gen_ai.request.model"] == "x" * VALUE_CHARS_MAX
