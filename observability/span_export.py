"""Spans on their way to a collector: over OTLP/HTTP, in the SDK's own thread, never waited for by a request.

The queue is bounded and what does not fit is dropped and counted. A collector that fails is logged once a while; one
that hangs holds up nothing, not even the end of the process.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

from observability.sdk_tracer import SdkTracer
from observability.tracing import TracingStatistics

logger = logging.getLogger(__name__)

# Spans that wait for the collector, some 2 KB each. A traced request has half a dozen; a node at full load ends a few
# thousand a second, so this is a second or two of everything.
QUEUE_SPANS_MAX = 8192
BATCH_SPANS_MAX = 512
EXPORT_INTERVAL_S = 1.0  # at most so long until a span is sent
EXPORT_TIMEOUT_S = 5.0  # of one batch, its retries included
CLOSE_TIMEOUT_S = 3.0  # for what waits at the end of the process; then it is dropped
FAILURE_LOG_INTERVAL_S = 60.0
REASON_CHARS_MAX = 300
# How the SDK ends the report of a failed batch; what it said of the tries before tells why.
SUMMARY = "due to timeout, max retries or shutdown"
VALUE_CHARS_MAX = 512  # of an attribute: clients choose the name of the model that they ask for


class SpanPipeline:
    """Takes ended spans, and counts what becomes of them. exporter: what sends a batch; it may wait, raise or hang.

    Spans end on one thread and are sent by another; each counter is written by one of the two."""

    def __init__(self, exporter: SpanExporter, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._sender = _Sender(exporter, monotonic)
        self._batches = BatchSpanProcessor(
            self._sender,
            max_queue_size=QUEUE_SPANS_MAX,
            schedule_delay_millis=EXPORT_INTERVAL_S * 1000,
            max_export_batch_size=BATCH_SPANS_MAX,
            export_timeout_millis=EXPORT_TIMEOUT_S * 1000,
        )
        self._queued = 0
        self._dropped = 0
        self.processor: SpanProcessor = _Gate(self)

    def offer(self, span: ReadableSpan) -> None:
        # Checked here, because the SDK's queue drops its oldest in silence. What the sender took is out of the queue.
        if self._queued - self._sender.taken >= QUEUE_SPANS_MAX:
            self._dropped += 1
            return
        self._queued += 1
        self._batches.on_end(span)

    def statistics(self) -> TracingStatistics:
        return TracingStatistics(self._sender.exported, self._dropped, self._sender.lost)

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Send what waits, for so long at most. Threads that still wait for the collector then are left behind; they
        are daemons, which the interpreter does not wait for."""
        closing = threading.Thread(target=self._batches.shutdown, name="span-export-close", daemon=True)
        closing.start()
        closing.join(timeout_s)
        left = self._queued - self._sender.exported - self._sender.told
        if left:
            logger.warning("spans were not exported before the end", extra={"count": left})


class _Gate(SpanProcessor):
    """Hands ended spans to the pipeline."""

    def __init__(self, pipeline: SpanPipeline) -> None:
        self._pipeline = pipeline

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        pass

    def on_end(self, span: ReadableSpan) -> None:
        self._pipeline.offer(span)


class _Sender(SpanExporter):
    """Sends batches, and tells of a collector that does not take them."""

    def __init__(self, exporter: SpanExporter, monotonic: Callable[[], float]) -> None:
        self.taken = 0
        self.exported = 0
        self.lost = 0
        self._exporter = exporter
        self._monotonic = monotonic
        self._reasons = _Reasons()
        self._told_at: float | None = None
        self.told = 0  # of the lost

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.taken += len(spans)
        self._reasons.latest = ""
        try:
            result = self._exporter.export(spans)
        except Exception as exc:  # whatever it is: the SDK's thread must outlive it
            self._reasons.latest = type(exc).__name__
            result = SpanExportResult.FAILURE
        if result is SpanExportResult.SUCCESS:
            self.exported += len(spans)
            if self._told_at is not None:
                logger.info("spans are exported again", extra={"count": self.lost})
            self._told_at = None
        else:
            self.lost += len(spans)
            self._tell()
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def _tell(self) -> None:
        now = self._monotonic()
        if self._told_at is None or now - self._told_at >= FAILURE_LOG_INTERVAL_S:
            self._told_at, self.told = now, self.lost
            logger.warning(
                "spans could not be exported; look at tracing_endpoint and the collector there",
                extra={"reason": self._reasons.latest, "count": self.lost},
            )


class _Reasons(logging.Handler):
    """The SDK says in its log lines alone why it failed, one for each try; they go here and no further."""

    def __init__(self) -> None:
        super().__init__()
        self.latest = ""
        sdk = logging.getLogger("opentelemetry")
        sdk.handlers[:] = [self]
        sdk.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if not self.latest or SUMMARY not in message:
            self.latest = message[:REASON_CHARS_MAX]


def open_pipeline(endpoint: str, headers: Mapping[str, str]) -> SpanPipeline:
    """endpoint: the whole URL that spans are posted to. headers: sent with them, and never logged."""
    return SpanPipeline(OTLPSpanExporter(endpoint=endpoint, headers=dict(headers), timeout=EXPORT_TIMEOUT_S))


def pipeline_tracer(
    pipeline: SpanPipeline, *, sample_ratio: float, service_name: str, node_id: str, version: str
) -> SdkTracer:
    """service_name: under which the collector files the spans; the node is an instance of the service."""
    resource = Resource.create(
        {"service.name": service_name, "service.instance.id": node_id, "service.version": version}
    )
    limits = SpanLimits(max_attribute_length=VALUE_CHARS_MAX)
    provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, span_limits=limits, shutdown_on_exit=False)
    provider.add_span_processor(pipeline.processor)
    return SdkTracer(provider, sample_ratio, rng=random.Random(), statistics=pipeline.statistics)
