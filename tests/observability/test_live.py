"""Debian's Prometheus and three real nodes with load, errors, limits, a failover and a killed node.

One test, because its parts follow each other: what is counted is compared with what the clients counted before a node
is killed, whose last counts nobody scraped.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from observability.grafana.dashboards import promql
from tests.cluster.mesh import Mesh, NodeProcess, wait_for
from tests.cluster.test_keys import create
from tests.metrics_page import page_rows
from tests.observability import load
from tests.observability.prometheus import SHIPPED, Prometheus, fast_configuration, require_prometheus

DOCS = Path(__file__).parents[2] / "docs"
SCRAPED_S = 20.0  # a loaded machine; a scrape comes each second
ALERT_S = 40.0
TOLERANCE = 0.01
LIMIT_PER_MINUTE = 5
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
# Exported where there is what they tell of.
MAY_BE_ABSENT = {"ai_cluster_gpu_", "ai_cluster_tls_", "process_max_fds"}
PANELS_OF_GPUS = {"AI Cluster Engine: GPU use", "AI Cluster Engine: GPU memory", "AI Cluster Engine: GPU temperature"}
GUIDE_QUERIES = """
rate(ai_cluster_http_requests_total[5m])
sum(rate(ai_cluster_http_requests_total[5m])) by (path)
histogram_quantile(0.95, rate(ai_cluster_http_request_duration_seconds_bucket[5m]))
avg(ai_cluster_inference_duration_seconds)
sum(ai_cluster_tokens_per_second)
sum(ai_cluster_tokens_per_second) by (model)
rate(ai_cluster_inference_requests_total{status="error"}[5m]) / rate(ai_cluster_inference_requests_total[5m])
process_cpu_seconds_total
process_resident_memory_bytes
ai_cluster_model_memory_bytes
rate(ai_cluster_tokens_generated_total[5m])
"""


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[tuple[Mesh, Prometheus]]:
    require_prometheus()
    mesh, prometheus = Mesh(tmp_path), Prometheus(tmp_path)
    try:
        for _ in range(2):
            mesh.add()
        yield mesh, prometheus
    finally:
        prometheus.close()
        mesh.close()


def closed_address() -> str:
    """Where nobody listens, as at a seed that was never started."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


def queries_of(page: Path) -> list[str]:
    """Those of the page's promql blocks; blank lines and comments part them."""
    blocks = re.findall(r"```promql\n(.*?)```", page.read_text(), re.DOTALL)
    found = [part for block in blocks for part in re.split(r"\n\s*\n", block)]
    return [query for part in found if (query := re.sub(r"#.*", "", part).strip())]


def recorded() -> list[str]:
    rules = yaml.safe_load((SHIPPED / "recording.yml").read_text())
    return [rule["record"] for group in rules["groups"] for rule in group["rules"]]


def settled(prometheus: Prometheus, expression: str, expected: float) -> None:
    """Until the value is within 1 % of what the clients counted."""
    seen = [0.0]

    def agrees() -> bool:
        seen[0] = prometheus.value(expression)
        return abs(seen[0] - expected) <= TOLERANCE * expected

    try:
        wait_for(agrees, expression, SCRAPED_S)
    except AssertionError:
        raise AssertionError(f"{expression}: {seen[0]}, and the clients counted {expected}") from None


def test_every_query_and_count_is_true_and_alerts_fire_when_nodes_err_and_die(
    setup: tuple[Mesh, Prometheus], tmp_path: Path
) -> None:
    mesh, prometheus = setup
    first, second = mesh.nodes
    free = create(first, "free")
    limited = create(first, "limited", "--requests-per-minute", str(LIMIT_PER_MINUTE))
    wait_for(lambda: load.make(load.call(first)).status == 401, "the first node demands keys", SCRAPED_S)
    seed = closed_address()
    addresses = {"localhost:8080": first.http, "127.0.0.1:8080": first.http, "localhost:8081": second.http}
    addresses |= {"127.0.0.1:8081": second.http, "localhost:8082": seed, "localhost:8083": seed}
    addresses["localhost:9090"] = closed_address()  # Prometheus knows its own port only once it runs
    prometheus.start(fast_configuration(tmp_path, addresses))
    third = mesh.add("--deadline-s", "0.3")  # what enters here ends in an error, if it is long
    mesh.wait_until_agreed()
    wait_for(lambda: prometheus.value(f'count(up{{instance!="{seed}"}} == 1)') == 3, "all are scraped", SCRAPED_S)
    check_discovery(mesh, prometheus, seed)
    before = {
        status: prometheus.value(f'sum(ai_cluster_http_requests_total{{path="{load.PATH}",status="{status}"}})')
        for status in (200, 401, 429)
    }
    wait_for(lambda: has_key_series(prometheus, free, limited), "the keys are known everywhere", SCRAPED_S)

    outcomes = load.make_all(
        load.call(
            mesh.nodes[i % 2],
            free,
            {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01"},
            stream=i % 3 == 0,
            max_tokens=4 + i % 9,
        )
        for i in range(60)
    )
    outcomes += load.make_all(load.call(mesh.nodes[i % 2], limited) for i in range(2 * LIMIT_PER_MINUTE))
    outcomes += load.make_all(load.call(first, "sk-wrong-key") for _ in range(5))
    reconcile(prometheus, outcomes, free, limited, before)
    check_page_and_scrape_agree(first)
    check_one_nodes_picture(mesh, prometheus)

    failed = load.make_all(
        load.call(third, free, stream=i % 2 == 0, ignore_eos=True, max_tokens=900) for i in range(12)
    )
    assert load.by_outcome(failed)["error"] == len(failed), load.by_outcome(failed)
    settled(prometheus, f'sum(ai_cluster_api_key_requests_total{{key_id="{label(free)}",status="error"}})', len(failed))
    settled(prometheus, 'sum(ai_cluster_inference_requests_total{status="error"})', len(failed))
    wait_for(lambda: "HighErrorRate" in prometheus.firing(), "HighErrorRate fires", ALERT_S)
    assert not prometheus.firing() & {"NodesDown", "NodeUnreachable", "ViewsDisagree"}

    answers = fail_over(first, second, free)
    assert load.by_outcome(answers)["success"] == len(answers)
    wait_for(lambda: prometheus.value("sum(ai_cluster_failovers_total)") >= 1, "the failover is scraped", SCRAPED_S)
    wait_for(lambda: {"NodesDown", "NodeUnreachable"} <= prometheus.firing(), "the death is told", ALERT_S)
    # The killed node was one of the two that answer discovery.
    assert prometheus.targets()["ai-cluster-workers"] == {second.http, third.http, seed}
    check_queries(prometheus)
    expected = {"HighErrorRate", "NodesDown", "NodeUnreachable", "FailoversHigh", "KeyNearLimit"}
    assert {alert for alert in prometheus.firing() if "Budget" not in alert} <= expected


def label(token: str) -> str:
    """The key as metrics call it."""
    return "-".join(token.split("-")[:2])


def has_key_series(prometheus: Prometheus, *tokens: str) -> bool:
    names = "|".join(label(token) for token in tokens)
    return prometheus.value(f'count(ai_cluster_api_key_rate_limit_hits_total{{key_id=~"{names}"}})') == 3 * len(tokens)


def reconcile(
    prometheus: Prometheus, outcomes: list[load.Outcome], free: str, limited: str, before: dict[int, float]
) -> None:
    """Requests, tokens, limits and streams, as the clients counted them."""
    statuses = load.by_status(outcomes)
    assert statuses[200] >= 60 + LIMIT_PER_MINUTE
    assert statuses[429] >= 1
    assert statuses[401] == 5
    for status in before:
        expression = f'sum(ai_cluster_http_requests_total{{path="{load.PATH}",status="{status}"}})'
        settled(prometheus, expression, before[status] + statuses[status])
    good = [outcome for outcome in outcomes if outcome.outcome == "success"]
    settled(prometheus, 'sum(ai_cluster_inference_requests_total{status="success"})', len(good))
    for kind in ("prompt", "completion"):
        tokens = sum(getattr(outcome, f"{kind}_tokens") for outcome in good)
        settled(prometheus, f'sum(ai_cluster_tokens_generated_total{{type="{kind}"}})', tokens)
    for token in (free, limited):
        mine = load.by_outcome(outcome for outcome in outcomes if outcome.call.token == token)
        for status, count in mine.items():
            chosen = f'key_id="{label(token)}",status="{status}"'
            settled(prometheus, f"sum(ai_cluster_api_key_requests_total{{{chosen}}})", count)
    settled(prometheus, f'sum(ai_cluster_api_key_rate_limit_hits_total{{key_id="{label(limited)}"}})', statuses[429])
    streams = [outcome for outcome in good if outcome.call.is_stream]
    settled(prometheus, 'sum(ai_cluster_streaming_requests_total{status="success"})', len(streams))
    settled(prometheus, "sum(ai_cluster_streaming_duration_seconds_count)", len(streams))
    settled(prometheus, "sum(ai_cluster_time_to_first_token_seconds_count)", len(good))
    settled(prometheus, "sum(ai_cluster_queue_time_seconds_count)", len(good))
    assert TRACE_ID in {
        labels.get("trace_id")
        for labels in prometheus.exemplars(f'ai_cluster_http_request_duration_seconds_bucket{{path="{load.PATH}"}}')
    }


def check_discovery(mesh: Mesh, prometheus: Prometheus, seed: str) -> None:
    for node in mesh.nodes:
        status, body = node.request("/cluster/sd")
        assert status == 200
        assert {target for group in json.loads(body) for target in group["targets"]} == {n.http for n in mesh.nodes}
    first, second, third = mesh.nodes
    targets = prometheus.targets()
    assert targets["ai-cluster-controller"] == {first.http}
    assert targets["ai-cluster-workers"] == {second.http, third.http, seed}
    assert prometheus.value(f'count(up{{job=~"ai-cluster.*",instance!="{seed}"}})') == 3  # each is scraped once


def check_page_and_scrape_agree(node: NodeProcess) -> None:
    """docs/metrics.md and a live node, both ways."""
    exported: dict[str, str] = {}
    for path in ("/metrics", "/metrics/cluster"):
        status, body = node.request(path)
        assert status == 200
        for family in text_string_to_metric_families(body.decode()):
            if path == "/metrics" or family.name == "ai_cluster_cluster_scrape_up":
                exported[family.name + ("_total" if family.type == "counter" else "")] = family.type
    documented = {name: row.kind for name, row in page_rows().items()}
    missing = {name for name in documented.keys() - exported.keys() if not name.startswith(tuple(MAY_BE_ABSENT))}
    assert missing == set()
    assert {name: documented.get(name) for name in exported} == exported


def check_one_nodes_picture(mesh: Mesh, prometheus: Prometheus) -> None:
    """What one node says of all is what all say of themselves."""
    first = mesh.nodes[0]
    families = list(text_string_to_metric_families(first.request("/metrics/cluster")[1].decode()))
    samples = [sample for family in families for sample in family.samples]
    assert all("node_id" in sample.labels for sample in samples)
    for name in ("ai_cluster_tokens_generated_total", "ai_cluster_inference_requests_total"):
        merged = sum(sample.value for sample in samples if sample.name == name)
        assert merged == prometheus.value(f"sum({name})"), name
    up = {s.labels["node_id"]: s.value for s in samples if s.name == "ai_cluster_cluster_scrape_up"}
    assert up == {node.name: 1.0 for node in mesh.nodes}
    assert first.metric("ai_cluster_cluster_nodes_total", status="healthy") == 3
    assert prometheus.query('ai_cluster_cluster_nodes_total{status="healthy"}')[0][1] == 3
    wait_for(lambda: not any(node.status()["views_disagreeing"] for node in mesh.nodes), "all agree", SCRAPED_S)
    assert len({node.status()["view_hash"] for node in mesh.nodes}) == 1


def fail_over(entry: NodeProcess, victim: NodeProcess, token: str) -> list[load.Outcome]:
    """Streams that enter at one node, and the death of another one that executes some of them."""
    answers: list[load.Outcome] = []
    began = victim.metric("ai_cluster_inference_started_total")

    def ask() -> None:
        answers.append(load.make(load.call(entry, token, stream=True, ignore_eos=True, max_tokens=600)))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    wait_for(lambda: victim.metric("ai_cluster_inference_started_total") > began, "the victim executes", SCRAPED_S)
    time.sleep(0.05)  # some tokens have come
    victim.kill()
    for thread in threads:
        thread.join(load.TIMEOUT_S)
    assert len(answers) == len(threads)
    return answers


def check_queries(prometheus: Prometheus) -> None:
    """Every query of the guide, of our page, every recording rule and every panel has data."""
    panels = {name for name, asked in promql().items() if not any(prometheus.query(query) for query in asked)}
    assert panels - PANELS_OF_GPUS == set()
    guide = [line for line in GUIDE_QUERIES.splitlines() if line]
    page = queries_of(DOCS / "monitoring.md") + queries_of(DOCS / "metrics.md")
    assert page
    empty = [query for query in [*guide, *page, *recorded()] if not prometheus.query(query)]
    assert empty == []
