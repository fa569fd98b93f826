"""Counters and histograms observed as they happen in this process, and the rendering of a scrape.

Methods are called on the trio thread and cost microseconds; nothing here waits. Rendering runs in a worker thread and
reads a frozen Snapshot. Who counts what: HTTP, keys and streams at the node that took the request; inference and
tokens at the node that executed it.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar, cast

import psutil
import trio
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    disable_created_metrics,
)
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from mesh.view import ClusterView
from observability.cluster_collector import ClusterCollector
from observability.collectors import EngineCollector, GuardedCollector, MeshCollector, Snapshot
from observability.families import LABEL_VALUES_MAX, OTHER, PREFIX
from observability.gpu import gpu_collector
from observability.process import process_collector
from observability.token_histogram import TokenHistogram

# How a generation ended: well; by our fault; the client left; no capacity, a limit, or a bad request.
STATUSES = ("success", "error", "cancelled", "rejected")
TOKEN_TYPES = ("prompt", "completion")
FINISH_REASONS = ("stop", "length")
UNKNOWN_MODEL = "unknown"
# Key ids counted without an issued key, known from the start so that rate() sees their first event.
KEYS_BUILT_IN = ("anonymous", "invalid")

# Up to the request deadline of 600 s: a quantile clamps at the last bound, and an alert above it could never fire.
DURATION_BUCKETS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
# vLLM's bounds, so that its dashboards read ours, and 2 s, where the usual objective lies.
FIRST_TOKEN_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip

# From a GPU's milliseconds to what a reader takes for a hang.
NEXT_TOKEN_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 30,
)  # fmt: skip

# Of an exemplar's names and values together, as OpenMetrics has it; the client library raises beyond it.
EXEMPLAR_CHARS_MAX = 128
# The fastest: two thirds of the size saved at a tenth of the time that rendering takes.
GZIP_LEVEL = 1

# Scrapes rendered at a time: a render is pure Python under the interpreter lock, more would only starve the loop.
RENDER_THREADS_MAX = 2


Child = TypeVar("Child", Counter, Histogram)


@dataclass(frozen=True, slots=True)
class Exposition:
    """The answer to a scrape. content_encoding: "gzip" or empty."""

    content_type: str
    body: bytes
    content_encoding: str = ""


class Metrics:
    """All metrics of one node. node_id and version label what is exported; the registry is this object's own."""

    def __init__(self, node_id: str, version: str) -> None:
        # The _created series are a third of the exposition, and no query of ours uses them.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._node_id = node_id
        self._models: set[str] = set()
        self._label_values: dict[str, set[str]] = {}
        self._children: dict[tuple[Counter | Histogram, tuple[str, ...]], Counter | Histogram] = {}
        self._render_limit = trio.CapacityLimiter(RENDER_THREADS_MAX)
        self._registry = registry = CollectorRegistry()

        def counter(name: str, help_text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, help_text, labels, registry=registry)

        def gauge(name: str, help_text: str, *labels: str) -> Gauge:
            return Gauge(PREFIX + name, help_text, labels, registry=registry)

        def histogram(name: str, help_text: str, *labels: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, help_text, labels, registry=registry, buckets=buckets)

        seconds = DURATION_BUCKETS_S
        self._http = counter("http_requests", "HTTP requests this node took.", "method", "path", "status")
        self._http_seconds = histogram(
            "http_request_duration_seconds",
            "From the request's head to the end of its response.",
            *("method", "path", "status"),
            buckets=seconds,
        )
        self._started = counter("inference_started", "Generations begun here.", "model")
        self._inferences = counter("inference_requests", "Generations ended here.", "model", "status")
        self._inference_seconds = histogram(
            "inference_duration_seconds", "Executed generations, queue included.", "model", "node_id", buckets=seconds
        )
        self._first_token = histogram(
            "time_to_first_token_seconds",
            "From a generation's start to its first token, at the node that executes it.",
            *("model", "node_id"),
            buckets=FIRST_TOKEN_BUCKETS_S,
        )
        self._queue_seconds = histogram(
            "queue_time_seconds",
            "How much of it a generation waited for a slot.",
            *("model", "node_id"),
            buckets=seconds,
        )
        self._next_tokens = TokenHistogram(
            PREFIX + "inter_token_latency_seconds",
            "Between two tokens of a generation, at the node that executes it.",
            ("model", "node_id"),
            node_id,
            bounds=NEXT_TOKEN_BUCKETS_S,
        )
        registry.register(self._next_tokens)
        self._finish_reasons = counter(
            "inference_finish_reasons", "Generations ended well, by why they ended.", "model", "reason"
        )
        self._tokens = counter("tokens_generated", "Tokens of generations ended here.", "model", "type")
        self._streams = counter("streaming_requests", "Streamed requests this node took.", "model", "status")
        self._stream_seconds = histogram(
            "streaming_duration_seconds", "Streamed requests that were executed.", "model", buckets=seconds
        )
        self._keys = counter("api_key_requests", "Requests by the key shown.", "key_id", "status")
        self._limit_hits = counter("api_key_rate_limit_hits", "Requests refused at a key's limit.", "key_id")
        self._load_seconds = gauge("model_load_time_seconds", "Time it took to load a model.", "model", "node_id")
        self._memory = gauge("model_memory_bytes", "Memory a loaded model takes.", "model", "node_id")
        gauge("cpus", "CPU cores this process may use.").set(_cpus())
        Info(PREFIX + "node", "Which node and version this is.", registry=registry).info(
            {"node_id": node_id, "version": version}
        )
        # Outside the registry, because it is collected last: so it counts the failures of the scrape it is in.
        self._errors = Counter(
            PREFIX + "collector_errors", "Collectors that failed in a scrape.", ["collector"], registry=None
        )
        registry.register(GuardedCollector(process_collector(), self._errors))
        registry.register(GuardedCollector(PlatformCollector(registry=None), self._errors))
        if (gpus := gpu_collector()) is not None:
            registry.register(GuardedCollector(gpus, self._errors))
        self._known_keys: set[str] = set()
        for key_id in KEYS_BUILT_IN:
            self.know_key(key_id)

    # What will be counted: its series begin at 0, without which rate() misses the first event.

    def know_model(self, name: str, *, is_local: bool = True) -> None:
        """From now on requests for `name` count under it and no longer as "unknown". is_local: this node serves it."""
        if len(self._models) < LABEL_VALUES_MAX:
            self._models.add(name)
        model = self._model(name)
        for status in STATUSES:
            self._streams.labels(model, status)
        self._stream_seconds.labels(model)
        if is_local:
            for status in STATUSES:
                self._inferences.labels(model, status)
            for kind in TOKEN_TYPES:
                self._tokens.labels(model, kind)
            for reason in FINISH_REASONS:
                self._finish_reasons.labels(model, reason)
            self._started.labels(model)
            self._queue_seconds.labels(model, self._node_id)
            self._next_tokens.know(model)
            self._inference_seconds.labels(model, self._node_id)
            self._first_token.labels(model, self._node_id)

    def know_view(self, view: ClusterView) -> None:
        """Know the models that any member serves. Cheap when there is no new one; every scrape does it too."""
        names = {model.name for member in view.members.values() for model in member.profile.models}
        for name in sorted(names - self._models):
            self.know_model(name, is_local=False)

    def know_route(self, method: str, path: str, statuses: Iterable[int]) -> None:
        """path: a route's template; statuses: those that answers of it usually have."""
        for status in statuses:
            labels = method, self._bounded("path", path), self._bounded("http_status", str(status))
            self._http.labels(*labels)
            self._http_seconds.labels(*labels)

    def know_key(self, key_id: str) -> None:
        """key_id: the public id, `sk-` and letters; never the key. Cheap when it is known; every scrape does it too."""
        if key_id in self._known_keys or len(self._known_keys) >= LABEL_VALUES_MAX:
            return
        self._known_keys.add(key_id)
        key_id = self._bounded("key_id", key_id)
        for status in STATUSES:
            self._keys.labels(key_id, status)
        self._limit_hits.labels(key_id)

    # At the node that took the request.

    def http_request(
        self, method: str, path: str, status: int, seconds: float, exemplar: Mapping[str, str] | None = None
    ) -> None:
        """path: the route's template, or "unmatched"; never the URL as sent. exemplar: what finds the request in logs
        and traces, request_id and trace_id."""
        labels = self._bounded("method", method), self._bounded("path", path), self._bounded("http_status", str(status))
        self._of(self._http, labels).inc()
        self._of(self._http_seconds, labels).observe(seconds, _exemplar(exemplar))

    def api_key_request(self, key_id: str, status: str) -> None:
        self._of(self._keys, (self._bounded("key_id", key_id), self._bounded("status", status))).inc()

    def rate_limited(self, key_id: str) -> None:
        self._limit_hits.labels(self._bounded("key_id", key_id)).inc()

    def streaming_finished(self, model: str, status: str, seconds: float) -> None:
        """A rejected stream counts and has no duration: it would make the quantiles look better than they are."""
        model = self._model(model)
        self._of(self._streams, (model, self._bounded("status", status))).inc()
        if status != "rejected":
            self._of(self._stream_seconds, (model,)).observe(seconds)

    # At the node that executes it.

    def model_loaded(self, model: str, load_seconds: float, memory_bytes: int) -> None:
        self.know_model(model)
        labels = self._model(model), self._node_id
        self._load_seconds.labels(*labels).set(load_seconds)
        self._memory.labels(*labels).set(memory_bytes)

    def inference_started(self, model: str) -> None:
        self._of(self._started, (self._model(model),)).inc()

    def time_to_first_token(
        self, model: str, seconds: float, queued_s: float | None = None, exemplar: Mapping[str, str] | None = None
    ) -> None:
        """queued_s: how much of it the request waited for a slot; None where it needed none."""
        labels = self._model(model), self._node_id
        self._of(self._first_token, labels).observe(seconds, _exemplar(exemplar))
        if queued_s is not None:
            self._of(self._queue_seconds, labels).observe(queued_s)

    def inter_token(self, model: str, seconds: float, count: int) -> None:
        """seconds: since the generation's event before; count: the tokens that came with this one."""
        if count:
            self._next_tokens.observe(model, seconds / count, count)

    def inference_finished(
        self,
        model: str,
        status: str,
        seconds: float,
        prompt_tokens: int,
        completion_tokens: int,
        exemplar: Mapping[str, str] | None = None,
        finish_reason: str | None = None,
    ) -> None:
        """A rejected generation counts and has no duration, as with streams."""
        model = self._model(model)
        self._of(self._inferences, (model, self._bounded("status", status))).inc()
        if finish_reason is not None:
            self._of(self._finish_reasons, (model, self._bounded("reason", finish_reason))).inc()
        if status != "rejected":
            self._of(self._inference_seconds, (model, self._node_id)).observe(seconds, _exemplar(exemplar))
        self._of(self._tokens, (model, "prompt")).inc(prompt_tokens)
        self._of(self._tokens, (model, "completion")).inc(completion_tokens)

    async def render(self, snapshot: Snapshot, accept: str = "", accept_encoding: str = "") -> Exposition:
        """accept, accept_encoding: the headers' values. OpenMetrics where it is asked for, else Prometheus's text
        format, which alone has no exemplars; gzip where it is taken."""
        self.know_view(snapshot.view)
        for key_id in snapshot.key_ids:
            self.know_key(key_id)
        return await trio.to_thread.run_sync(
            self._render, snapshot, accept, accepts_gzip(accept_encoding), limiter=self._render_limit
        )

    def _render(self, snapshot: Snapshot, accept: str, is_gzipped: bool) -> Exposition:
        try:
            encode, content_type = choose_encoder(accept)
        except TypeError:  # what the client library raises for a version that is no number
            encode, content_type = choose_encoder("")
        return exposition(content_type, encode(_Scrape(self._registry, snapshot, self._errors)), is_gzipped)

    def _model(self, name: str) -> str:
        if name in self._models:
            return name
        return UNKNOWN_MODEL if len(self._models) < LABEL_VALUES_MAX else OTHER

    def _of(self, metric: Child, labels: tuple[str, ...]) -> Child:
        """metric.labels(*labels), remembered: the library checks labels anew each time. Their values are bounded."""
        found = self._children.get((metric, labels))
        if found is None:
            found = self._children[metric, labels] = metric.labels(*labels)
        return cast(Child, found)

    def _bounded(self, label: str, value: str) -> str:
        """value, or "other" once the label has LABEL_VALUES_MAX distinct ones."""
        seen = self._label_values.setdefault(label, set())
        if value not in seen:
            if len(seen) >= LABEL_VALUES_MAX:
                return OTHER
            seen.add(value)
        return value


def exposition(content_type: str, body: bytes, is_gzipped: bool) -> Exposition:
    if not is_gzipped:
        return Exposition(content_type, body)
    return Exposition(content_type, gzip.compress(body, GZIP_LEVEL), "gzip")


def accepts_gzip(accept_encoding: str) -> bool:
    """Whether the header's value takes gzip; a weight of 0 says no."""
    for choice in accept_encoding.lower().split(","):
        coding, _, weight = choice.partition(";")
        if coding.strip() in ("gzip", "x-gzip", "*"):
            return weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False


def _exemplar(labels: Mapping[str, str] | None) -> dict[str, str] | None:
    """As many of the labels, the last first, as an exemplar may hold; a client chooses the length of its request id."""
    shown: dict[str, str] = {}
    room = EXEMPLAR_CHARS_MAX
    for name, value in reversed(list((labels or {}).items())):
        room -= len(name) + len(value)
        if value and room >= 0:
            shown[name] = value
    return shown or None


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1


class ExecutorMetrics:
    """The observer of a node's local generations, in the words of the place that calls it."""

    def __init__(self, metrics: Metrics) -> None:
        self.started = metrics.inference_started
        self.first_token = metrics.time_to_first_token
        self.next_tokens = metrics.inter_token
        self.finished = metrics.inference_finished


class _Scrape(Collector):
    """Everything one scrape exports, as one collector that an encoder reads once."""

    def __init__(self, registry: CollectorRegistry, snapshot: Snapshot, errors: Counter) -> None:
        self._registry = registry
        self._errors = errors
        pulled = (ClusterCollector(snapshot), EngineCollector(snapshot), MeshCollector(snapshot))
        self._pulled = [GuardedCollector(collector, errors) for collector in pulled]

    def collect(self) -> Iterable[Metric]:
        yield from self._registry.collect()
        for collector in self._pulled:
            yield from collector.collect()
        yield from self._errors.collect()
