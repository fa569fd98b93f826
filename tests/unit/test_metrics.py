import gzip
import threading
from collections.abc import Callable

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from mesh.view import ModelInfo, NodeProfile
from nodes.api.services import ApiMetrics
from observability.collectors import MESH_FAMILIES, KeyLimit, Snapshot
from observability.families import LABEL_VALUES_MAX
from observability.merge import merge
from observability.metrics import DURATION_BUCKETS_S, STATUSES, ExecutorMetrics, Metrics
from tests.metrics_page import page_rows
from tests.unit.fake_nvml import gpu_families
from tests.unit.test_collectors import FakeEngineFigures, FakeKvFigures, make_member, make_view

OPENMETRICS = "application/openmetrics-text; version=1.0.0"

# What the monitoring guide promises: sample name, labels.
GUIDE = {
    "ai_cluster_http_requests_total": {"method", "path", "status"},
    "ai_cluster_http_request_duration_seconds_bucket": {"method", "path", "status", "le"},
    "ai_cluster_inference_requests_total": {"model", "status"},
    "ai_cluster_inference_duration_seconds_bucket": {"model", "node_id", "le"},
    "ai_cluster_tokens_generated_total": {"model", "type"},
    "ai_cluster_tokens_per_second": {"model", "node_id"},
    "ai_cluster_cluster_nodes_total": {"status"},
    "ai_cluster_cluster_active_requests": {"node_id"},
    "ai_cluster_model_load_time_seconds": {"model", "node_id"},
    "ai_cluster_model_memory_bytes": {"model", "node_id"},
    "ai_cluster_api_key_requests_total": {"key_id", "status"},
    "ai_cluster_api_key_rate_limit_hits_total": {"key_id"},
    "ai_cluster_streaming_requests_total": {"model", "status"},
    "ai_cluster_streaming_duration_seconds_bucket": {"model", "le"},
    "process_cpu_seconds_total": set(),
    "process_resident_memory_bytes": set(),
}


class Scraped:
    """A parsed exposition."""

    def __init__(self, text: str) -> None:
        self.families = list(parse_text(text))
        self._samples = [sample for family in self.families for sample in family.samples]

    def value(self, name: str, **labels: str) -> float | None:
        """The one sample with these labels among its labels, or None."""
        found = [s.value for s in self._samples if s.name == name and labels.items() <= s.labels.items()]
        assert len(found) <= 1, found
        return found[0] if found else None

    def label_values(self, name: str, label: str) -> set[str]:
        return {sample.labels[label] for sample in self._samples if sample.name == name}

    def labels(self) -> dict[str, set[str]]:
        return {sample.name: set(sample.labels) for sample in self._samples}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("me", "1.2.3")


def whole_snapshot() -> Snapshot:
    """With every metric of the mesh and one model."""
    shapes = {0: 1, 1: {"some": 1}, 2: {("in", "some"): 1}}
    mesh = {family.key: shapes[len(family.labels)] for family in MESH_FAMILIES}
    return Snapshot(
        make_view(make_member("peer")),
        active_requests=1,
        engines={"demo": FakeEngineFigures(active=1, queued=2, free_slots=3, tokens_per_s=4.0)},
        kv={"demo": FakeKvFigures(1000, 250, 100)},
        key_ids=["sk-a"],
        limits=[KeyLimit("sk-a", "requests", 10, 3)],
        mesh=mesh,  # type: ignore[arg-type]
    )


async def scrape(metrics: Metrics, snapshot: Snapshot | None = None) -> Scraped:
    return Scraped((await metrics.render(snapshot or Snapshot(make_view()))).body.decode())


async def scrape_everything(metrics: Metrics) -> Scraped:
    metrics.model_loaded("demo", 1.5, 1000)
    metrics.http_request("GET", "/health", 200, 0.001)
    return await scrape(metrics, whole_snapshot())


async def test_every_metric_of_the_monitoring_guide_is_exported_with_its_labels(metrics: Metrics) -> None:
    found = (await scrape_everything(metrics)).labels()
    assert {name: found.get(name) for name in GUIDE} == GUIDE


async def test_the_page_lists_exactly_what_is_exported_with_type_and_labels(metrics: Metrics) -> None:
    await scrape_everything(metrics)
    text = (await metrics.render(whole_snapshot())).body.decode()
    merged = Scraped(merge("me", {"me": text}, {"me": True})).families  # with what /metrics/cluster adds
    exported = {}
    for family in [*Scraped(text).families, *(f for f in merged if f.name.endswith("scrape_up")), *gpu_families()]:
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = frozenset(label for sample in family.samples for label in sample.labels) - {"le"}
        exported[name] = family.type, labels
    assert {name: (row.kind, row.labels) for name, row in page_rows().items()} == exported


@pytest.mark.parametrize(
    ("suffix", "unit"), [("_seconds", "seconds"), ("_bytes", "bytes"), ("_ratio", "ratio"), ("_celsius", "°C")]
)
def test_the_page_gives_the_unit_that_a_name_ends_with(suffix: str, unit: str) -> None:
    rows = {name: row.unit for name, row in page_rows().items()}
    assert all(rows.values())
    named = {name for name in rows if name.removesuffix("_total").endswith(suffix)}
    assert named
    assert named == {name for name in rows if rows[name] == unit}


async def test_the_class_is_what_the_api_asks_for(metrics: Metrics) -> None:
    api: ApiMetrics = metrics
    metrics.know_model("demo")
    api.http_request("POST", "/v1/chat/completions", 200, 0.3)
    api.api_key_request("anonymous", "success")
    api.streaming_finished("demo", "success", 0.4)
    found = await scrape(metrics)
    labels = {"method": "POST", "path": "/v1/chat/completions", "status": "200"}
    assert found.value("ai_cluster_http_requests_total", **labels) == 1
    assert found.value("ai_cluster_http_request_duration_seconds_sum", **labels) == 0.3
    assert found.value("ai_cluster_api_key_requests_total", key_id="anonymous", status="success") == 1
    assert found.value("ai_cluster_streaming_requests_total", model="demo", status="success") == 1
    assert found.value("ai_cluster_streaming_duration_seconds_sum", model="demo") == 0.4


async def test_the_executor_counts_generations_and_their_tokens(metrics: Metrics) -> None:
    metrics.model_loaded("demo", 2.5, 4096)
    observer = ExecutorMetrics(metrics)
    observer.started("demo")
    observer.first_token("demo", 0.07, 0.02, {"request_id": "r"})
    observer.next_tokens("demo", 0.09, 3)
    observer.finished("demo", "success", 1.2, 10, 32, {"request_id": "r"}, "length")
    found = await scrape(metrics)
    assert found.value("ai_cluster_model_load_time_seconds", model="demo", node_id="me") == 2.5
    assert found.value("ai_cluster_model_memory_bytes", model="demo", node_id="me") == 4096
    assert found.value("ai_cluster_inference_started_total", model="demo") == 1
    assert found.value("ai_cluster_inference_requests_total", model="demo", status="success") == 1
    assert found.value("ai_cluster_inference_duration_seconds_sum", model="demo", node_id="me") == 1.2
    assert found.value("ai_cluster_tokens_generated_total", model="demo", type="prompt") == 10
    assert found.value("ai_cluster_tokens_generated_total", model="demo", type="completion") == 32
    assert found.value("ai_cluster_time_to_first_token_seconds_bucket", model="demo", le="0.06") == 0
    assert found.value("ai_cluster_time_to_first_token_seconds_bucket", model="demo", le="0.08") == 1
    assert found.value("ai_cluster_queue_time_seconds_sum", model="demo", node_id="me") == 0.02
    assert found.value("ai_cluster_inter_token_latency_seconds_count", model="demo", node_id="me") == 3
    assert found.value("ai_cluster_inter_token_latency_seconds_sum", model="demo") == pytest.approx(0.09)
    assert found.value("ai_cluster_inference_finish_reasons_total", model="demo", reason="length") == 1
    assert found.value("ai_cluster_inference_finish_reasons_total", model="demo", reason="stop") == 0


async def test_the_series_of_a_known_model_begin_at_zero(metrics: Metrics) -> None:
    metrics.know_model("demo")
    found = await scrape(metrics)
    for status in STATUSES:
        assert found.value("ai_cluster_inference_requests_total", model="demo", status=status) == 0
        assert found.value("ai_cluster_streaming_requests_total", model="demo", status=status) == 0
        assert found.value("ai_cluster_api_key_requests_total", key_id="anonymous", status=status) == 0
    assert found.value("ai_cluster_inference_duration_seconds_count", model="demo") == 0
    assert found.value("ai_cluster_tokens_generated_total", model="demo", type="prompt") == 0
    assert found.value("ai_cluster_api_key_rate_limit_hits_total", key_id="anonymous") == 0


async def test_the_series_of_a_known_route_begin_at_zero(metrics: Metrics) -> None:
    metrics.know_route("POST", "/v1/completions", (200, 503))
    found = await scrape(metrics)
    labels = {"method": "POST", "path": "/v1/completions"}
    for status in ("200", "503"):
        assert found.value("ai_cluster_http_requests_total", status=status, **labels) == 0
        assert found.value("ai_cluster_http_request_duration_seconds_count", status=status, **labels) == 0


async def test_a_key_made_known_begins_at_zero_and_counts_its_limit_hits(metrics: Metrics) -> None:
    metrics.know_key("sk-abc123")
    assert (await scrape(metrics)).value("ai_cluster_api_key_rate_limit_hits_total", key_id="sk-abc123") == 0
    metrics.rate_limited("sk-abc123")
    assert (await scrape(metrics)).value("ai_cluster_api_key_rate_limit_hits_total", key_id="sk-abc123") == 1


async def test_a_model_that_nobody_serves_counts_as_unknown(metrics: Metrics) -> None:
    for name in ("gpt-4", "gpt-5", "'; drop table"):
        metrics.streaming_finished(name, "rejected", 0.0)
    found = await scrape(metrics)
    assert found.label_values("ai_cluster_streaming_requests_total", "model") == {"unknown"}
    assert found.value("ai_cluster_streaming_requests_total", model="unknown", status="rejected") == 3


async def test_a_model_of_a_peer_counts_under_its_name_at_an_entry_and_has_no_series_of_an_executor(
    metrics: Metrics,
) -> None:
    profile = NodeProfile(models=(ModelInfo("large", "f00d", 4096, 8),))
    metrics.know_view(make_view(make_member("peer", profile=profile)))
    metrics.streaming_finished("large", "success", 1.0)
    found = await scrape(metrics)
    assert found.value("ai_cluster_streaming_requests_total", model="large", status="success") == 1
    assert found.label_values("ai_cluster_inference_requests_total", "model") == set()


@pytest.mark.parametrize(
    ("status", "count"), [("success", 1), ("error", 1), ("cancelled", 1), ("rejected", 0)], ids=STATUSES
)
async def test_only_what_was_executed_has_a_duration(metrics: Metrics, status: str, count: int) -> None:
    metrics.know_model("demo")
    metrics.inference_finished("demo", status, 1.0, 5, 0)
    metrics.streaming_finished("demo", status, 1.0)
    found = await scrape(metrics)
    assert found.value("ai_cluster_inference_requests_total", model="demo", status=status) == 1
    assert found.value("ai_cluster_inference_duration_seconds_count", model="demo") == count
    assert found.value("ai_cluster_streaming_duration_seconds_count", model="demo") == count


def count_paths(metrics: Metrics, value: str) -> None:
    metrics.http_request("GET", value, 200, 0.0)


def count_keys(metrics: Metrics, value: str) -> None:
    metrics.api_key_request(value, "success")


def count_models(metrics: Metrics, value: str) -> None:
    metrics.know_model(value, is_local=False)
    metrics.streaming_finished(value, "rejected", 0.0)


@pytest.mark.parametrize(
    ("count", "name", "label"),
    [
        pytest.param(count_paths, "ai_cluster_http_requests_total", "path", id="paths"),
        pytest.param(count_keys, "ai_cluster_api_key_requests_total", "key_id", id="keys"),
        pytest.param(count_models, "ai_cluster_streaming_requests_total", "model", id="models"),
    ],
)
async def test_label_values_beyond_the_limit_are_other(
    metrics: Metrics, count: Callable[[Metrics, str], None], name: str, label: str
) -> None:
    for i in range(LABEL_VALUES_MAX + 20):
        count(metrics, f"value-{i}")
    values = (await scrape(metrics)).label_values(name, label)
    assert "other" in values
    assert len(values) == LABEL_VALUES_MAX + 1


def test_no_bound_hides_what_takes_as_long_as_the_deadline() -> None:
    assert DURATION_BUCKETS_S[-1] >= 600


async def test_node_id_and_version_are_exported_and_no_creation_times(metrics: Metrics) -> None:
    found = await scrape_everything(metrics)
    assert found.value("ai_cluster_node_info", node_id="me", version="1.2.3") == 1
    assert not [name for name in found.labels() if name.endswith("_created")]


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        pytest.param("", "text/plain; version=0.0.4; charset=utf-8", id="none"),
        pytest.param("*/*", "text/plain; version=0.0.4; charset=utf-8", id="curl"),
        pytest.param(OPENMETRICS, f"{OPENMETRICS}; charset=utf-8; escaping=underscores", id="OpenMetrics"),
        pytest.param(
            "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4",
            f"{OPENMETRICS}; charset=utf-8; escaping=underscores",
            id="Prometheus",
        ),
        pytest.param("text/plain;version=x", "text/plain; version=0.0.4; charset=utf-8", id="version without number"),
        pytest.param("application/openmetrics-text;version=x", "text/plain; version=0.0.4; charset=utf-8", id="odd"),
    ],
)
async def test_the_accept_header_chooses_the_format(metrics: Metrics, accept: str, content_type: str) -> None:
    found = await metrics.render(whole_snapshot(), accept)
    assert found.content_type == content_type
    assert found.body.endswith(b"# EOF\n") == ("openmetrics" in content_type)


async def test_a_strict_parser_reads_all_of_the_openmetrics_format(metrics: Metrics) -> None:
    metrics.model_loaded("demo", 1.5, 1000)
    text = (await metrics.render(whole_snapshot(), OPENMETRICS)).body.decode()
    names = [family.name for family in parse_openmetrics(text)]
    assert "ai_cluster_cluster_nodes_total" in names
    assert len(names) == len(set(names))


@given(st.text(max_size=60))
def test_no_accept_header_breaks_a_scrape(accept: str) -> None:
    found = trio.run(Metrics("me", "1").render, Snapshot(make_view()), accept, accept)
    assert found.content_type
    text = gzip.decompress(found.body) if found.content_encoding else found.body
    assert b"ai_cluster_cluster_nodes_total" in text


async def test_a_collector_that_fails_costs_its_own_metrics_only(metrics: Metrics) -> None:
    found = await scrape(metrics, Snapshot(make_view(), mesh={"no_such_metric": 1}))
    assert found.value("ai_cluster_collector_errors_total", collector="MeshCollector") == 1
    assert found.value("ai_cluster_collector_errors_total", collector="ClusterCollector") == 0
    assert found.value("ai_cluster_cluster_nodes_expected") == 1
    assert found.value("ai_cluster_log_lines_dropped_total") is None


async def test_exemplars_name_request_and_trace_where_openmetrics_is_asked_for(metrics: Metrics) -> None:
    found_by = {"request_id": "req_1", "trace_id": "0af7651916cd43dd8448eb211c80319c"}
    metrics.http_request("POST", "/v1/chat/completions", 200, 0.3, found_by)
    metrics.model_loaded("demo", 1.0, 1)
    metrics.time_to_first_token("demo", 0.05, None, {"request_id": "req_1"})
    text = (await metrics.render(whole_snapshot(), OPENMETRICS)).body.decode()
    samples = [sample for family in parse_openmetrics(text) for sample in family.samples if sample.exemplar]
    shown = {(sample.name, *sample.exemplar.labels.items()) for sample in samples if sample.exemplar}
    assert ("ai_cluster_http_request_duration_seconds_bucket", *found_by.items()) in shown
    assert ("ai_cluster_time_to_first_token_seconds_bucket", ("request_id", "req_1")) in shown
    assert b"req_1" not in (await metrics.render(whole_snapshot())).body


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        pytest.param(None, None, id="none"),
        pytest.param({"request_id": "", "trace_id": ""}, None, id="empty"),
        pytest.param({"request_id": "x" * 118}, {"request_id": "x" * 118}, id="just fits"),
        pytest.param({"request_id": "x" * 119}, None, id="too long"),
        pytest.param(
            {"request_id": "x" * 100, "trace_id": "t" * 32}, {"trace_id": "t" * 32}, id="the trace comes first"
        ),
    ],
)
async def test_an_exemplar_is_as_long_as_the_format_allows(
    metrics: Metrics, labels: dict[str, str] | None, shown: dict[str, str] | None
) -> None:
    metrics.http_request("GET", "/", 200, 0.3, labels)
    text = (await metrics.render(whole_snapshot(), OPENMETRICS)).body.decode()
    samples = [
        sample
        for family in parse_openmetrics(text)
        for sample in family.samples
        if sample.name == "ai_cluster_http_request_duration_seconds_bucket"
    ]
    assert [sample.value for sample in samples if sample.labels["le"] == "+Inf"] == [1]
    exemplars = [dict(sample.exemplar.labels) for sample in samples if sample.exemplar]
    assert exemplars == ([] if shown is None else [shown])


@pytest.mark.parametrize(
    ("accepted", "is_gzipped"),
    [("", False), ("gzip", True), ("br, GZIP;q=0.5", True), ("gzip;q=0", False), ("*", True), ("identity", False)],
)
async def test_gzip_is_used_where_it_is_taken(metrics: Metrics, accepted: str, is_gzipped: bool) -> None:
    plain = (await metrics.render(whole_snapshot())).body
    found = await metrics.render(whole_snapshot(), "", accepted)
    assert (found.content_encoding == "gzip") == is_gzipped
    names = {line.split(b" ")[2] for line in plain.splitlines() if line.startswith(b"# TYPE")}
    text = gzip.decompress(found.body) if is_gzipped else found.body
    assert names == {line.split(b" ")[2] for line in text.splitlines() if line.startswith(b"# TYPE")}


async def test_keys_that_work_are_known_from_the_next_scrape_on(metrics: Metrics) -> None:
    found = await scrape(metrics, whole_snapshot())
    assert found.value("ai_cluster_api_key_requests_total", key_id="sk-a", status="success") == 0
    assert found.value("ai_cluster_api_key_rate_limit_hits_total", key_id="sk-a") == 0


class WatchedFigures:
    """Notes from which thread it is read."""

    active, free_slots, tokens_per_s, state, queued_tokens = 0, 0, 0.0, "ready", 0
    step_count = step_faults_total = kv_bytes = 0
    step_seconds_total = session_seconds_total = median_step_s = 0.0
    cache_queries_total = cache_hits_total = cache_query_tokens_total = cache_hit_tokens_total = 0

    def __init__(self) -> None:
        self.threads: set[int] = set()

    @property
    def queued(self) -> int:
        self.threads.add(threading.get_ident())
        return 0


async def test_rendering_leaves_the_trio_thread(metrics: Metrics) -> None:
    figures = WatchedFigures()
    await scrape(metrics, Snapshot(make_view(), engines={"demo": figures}))
    assert figures.threads
    assert threading.get_ident() not in figures.threads


async def test_concurrent_scrapes_do_not_mix_their_snapshots(metrics: Metrics) -> None:
    found: dict[int, Scraped] = {}

    async def scrape_as(number: int) -> None:
        engines = {f"model-{number}": FakeEngineFigures(active=number, tokens_per_s=float(number))}
        view = make_view(make_member(f"peer-{number}"))
        snapshot = Snapshot(view, active_requests=number, engines=engines, mesh={"forwards": number})
        found[number] = await scrape(metrics, snapshot)

    async with trio.open_nursery() as nursery:
        for number in range(24):
            nursery.start_soon(scrape_as, number)
    for number, scraped in found.items():
        assert scraped.label_values("ai_cluster_cluster_active_requests", "node_id") == {"me", f"peer-{number}"}
        assert scraped.value("ai_cluster_cluster_active_requests", node_id="me") == number
        assert scraped.value("ai_cluster_engine_slots", model=f"model-{number}", state="active") == number
        assert scraped.value("ai_cluster_forwards_total") == number


async def test_counting_goes_on_while_a_scrape_is_rendered(metrics: Metrics) -> None:
    counts: list[float] = []

    async def scrape_often() -> None:
        for _ in range(5):
            value = (await scrape(metrics)).value("ai_cluster_api_key_requests_total", key_id="x", status="success")
            counts.append(value or 0.0)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(scrape_often)
        nursery.start_soon(scrape_often)
        for i in range(2_000):
            metrics.http_request("GET", f"/route-{i}", 200, 0.0)
            metrics.api_key_request("x", "success")
            await trio.lowlevel.checkpoint()
    final = (await scrape(metrics)).value("ai_cluster_api_key_requests_total", key_id="x", status="success")
    assert final == 2_000
    assert all(0 <= count <= 2_000 for count in counts)
