import random
from collections.abc import Iterable
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Counter, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from mesh.view import Address, ClusterView, MemberStatus, MemberView, ModelLoad, NodeLoad, NodeProfile, Readiness
from observability.cluster_collector import ClusterCollector
from observability.collectors import (
    ENGINE_STATES,
    MESH_FAMILIES,
    EngineCollector,
    GuardedCollector,
    KeyLimit,
    MeshCollector,
    Snapshot,
)
from observability.families import LABEL_VALUES_MAX, Figure
from observability.process import PortableProcessCollector, process_collector

Samples = dict[tuple[str, ...], float]


@dataclass(frozen=True, slots=True)
class FakeEngineFigures:
    active: int = 0
    queued: int = 0
    free_slots: int = 0
    tokens_per_s: float = 0.0
    state: str = "ready"
    queued_tokens: int = 0
    step_count: int = 0
    step_seconds_total: float = 0.0
    session_seconds_total: float = 0.0
    median_step_s: float = 0.0
    step_faults_total: int = 0
    kv_bytes: int = 0
    cache_queries_total: int = 0
    cache_hits_total: int = 0
    cache_query_tokens_total: int = 0
    cache_hit_tokens_total: int = 0


@dataclass(frozen=True, slots=True)
class FakeKvFigures:
    capacity: int = 0
    used: int = 0
    cached: int = 0


def make_member(node_id: str, status: MemberStatus = MemberStatus.ALIVE, **changes: object) -> MemberView:
    member = MemberView(
        node_id=node_id,
        address=Address("127.0.0.1", 7946),
        status=status,
        generation=1,
        version=1,
        load=NodeLoad(readiness=Readiness.READY),
        profile=NodeProfile(),
        age_s=0.5,
    )
    return replace(member, **changes)  # type: ignore[arg-type]


def make_view(*members: MemberView, awareness: int = 0) -> ClusterView:
    """The observer is "me"."""
    me = make_member("me", is_self=True, age_s=0.0)
    everybody = {member.node_id: member for member in (me, *members)}
    return ClusterView(self_id="me", now=100.0, members=everybody, awareness=awareness)


def rows(metrics: Iterable[Metric], name: str) -> Samples:
    """Label values → value, of the samples of that name."""
    samples = (sample for metric in metrics for sample in metric.samples)
    return {tuple(s.labels.values()): s.value for s in samples if s.name == name}


def cluster(name: str, snapshot: Snapshot) -> Samples:
    return rows(ClusterCollector(snapshot).collect(), f"ai_cluster_{name}")


def test_members_are_counted_by_status_with_every_status_present() -> None:
    view = make_view(
        make_member("suspect", MemberStatus.SUSPECT),
        make_member("dead", MemberStatus.DEAD),
        make_member("left", MemberStatus.LEFT),
    )
    counts = cluster("cluster_nodes_total", Snapshot(view))
    assert counts == {("healthy",): 1, ("degraded",): 1, ("offline",): 1}
    assert cluster("cluster_nodes_total", Snapshot(make_view()))[("offline",)] == 0


@pytest.mark.parametrize(
    ("configured", "expected"),
    [pytest.param(None, 3, id="members known and not left"), pytest.param(5, 5, id="as configured")],
)
def test_the_nodes_expected_are(configured: int | None, expected: int) -> None:
    view = make_view(
        make_member("alive"), make_member("dead", MemberStatus.DEAD), make_member("left", MemberStatus.LEFT)
    )
    assert cluster("cluster_nodes_expected", Snapshot(view, nodes_expected=configured)) == {(): expected}


def test_the_own_row_is_live_and_those_of_peers_come_from_gossip() -> None:
    load = NodeLoad(readiness=Readiness.READY, active_requests=4, tokens_per_s=40.0)
    view = make_view(make_member("peer", load=load))
    engines = {"a": FakeEngineFigures(tokens_per_s=1.5), "b": FakeEngineFigures(tokens_per_s=2.0)}
    snapshot = Snapshot(view, active_requests=7, engines=engines)
    assert cluster("cluster_active_requests", snapshot) == {("me",): 7, ("peer",): 4}
    assert cluster("cluster_tokens_per_second", snapshot) == {("me",): 3.5, ("peer",): 40.0}


def test_the_last_load_of_a_dead_member_is_not_exported() -> None:
    load = NodeLoad(readiness=Readiness.READY, active_requests=4)
    view = make_view(make_member("dead", MemberStatus.DEAD, load=load))
    assert cluster("cluster_active_requests", Snapshot(view)) == {("me",): 0}


def test_peers_have_health_and_age_until_they_leave() -> None:
    view = make_view(
        make_member("well", age_s=1.25),
        make_member("dead", MemberStatus.DEAD, age_s=60.0),
        make_member("left", MemberStatus.LEFT),
    )
    assert cluster("cluster_peer_healthy", Snapshot(view)) == {("well",): 1, ("dead",): 0}
    assert cluster("cluster_peer_last_seen_age_seconds", Snapshot(view)) == {("well",): 1.25, ("dead",): 60.0}


def test_the_own_awareness_is_exported() -> None:
    assert cluster("gossip_awareness", Snapshot(make_view(awareness=3))) == {(): 3}


def test_members_beyond_the_limit_share_one_row_and_no_request_is_lost() -> None:
    rng = random.Random(7)
    members = [
        make_member(f"peer-{i:04}", load=NodeLoad(active_requests=rng.randrange(9)), age_s=float(i))
        for i in range(LABEL_VALUES_MAX + 50)
    ]
    snapshot = Snapshot(make_view(*members))
    active = cluster("cluster_active_requests", snapshot)
    assert len(active) == LABEL_VALUES_MAX + 1
    assert sum(active.values()) == sum(member.load.active_requests for member in members)
    assert cluster("cluster_peer_last_seen_age_seconds", snapshot)[("other",)] == LABEL_VALUES_MAX + 49
    assert cluster("cluster_peer_healthy", snapshot)[("other",)] == 0


def test_engines_are_exported_by_model() -> None:
    cache = {"cache_queries_total": 9, "cache_hits_total": 4, "cache_query_tokens_total": 900}
    engines = {
        "demo": FakeEngineFigures(
            active=3, queued=2, free_slots=5, tokens_per_s=12.5, cache_hit_tokens_total=300, **cache
        )
    }
    metrics = list(EngineCollector(Snapshot(make_view(), engines=engines)).collect())
    assert rows(metrics, "ai_cluster_tokens_per_second") == {("demo", "me"): 12.5}
    assert rows(metrics, "ai_cluster_engine_slots") == {("demo", "active"): 3, ("demo", "free"): 5}
    assert rows(metrics, "ai_cluster_engine_queue_depth") == {("demo",): 2}
    for key, count in {"queries": 9, "hits": 4, "query_tokens": 900, "hit_tokens": 300}.items():
        assert rows(metrics, f"ai_cluster_prefix_cache_{key}_total") == {("demo",): count}


def test_an_engines_state_steps_and_cache_are_exported() -> None:
    figures = FakeEngineFigures(state="stuck", queued_tokens=70, step_count=40, step_seconds_total=2.0, kv_bytes=4096)
    snapshot = Snapshot(make_view(), engines={"demo": figures}, kv={"demo": FakeKvFigures(1000, 250, 100)})
    metrics = list(EngineCollector(snapshot).collect())
    states = rows(metrics, "ai_cluster_engine_state")
    assert states == {("demo", state): float(state == "stuck") for state in ENGINE_STATES}
    assert rows(metrics, "ai_cluster_engine_queued_tokens") == {("demo",): 70}
    assert rows(metrics, "ai_cluster_engine_steps_total") == {("demo",): 40}
    assert rows(metrics, "ai_cluster_engine_step_seconds_total") == {("demo",): 2.0}
    assert rows(metrics, "ai_cluster_kv_cache_bytes") == {("demo",): 4096}
    assert rows(metrics, "ai_cluster_kv_cache_usage_ratio") == {("demo",): 0.25}
    assert rows(metrics, "ai_cluster_kv_cache_rows") == {
        ("demo", "used"): 250,
        ("demo", "cached"): 100,
        ("demo", "capacity"): 1000,
    }


def test_a_nodes_queue_slots_and_lag_are_its_own_live_and_peers_as_told() -> None:
    told = NodeLoad(loop_lag_s=0.5, models={"a": ModelLoad(queued=3, free_slots=1), "b": ModelLoad(queued=4)})
    engines = {"a": FakeEngineFigures(queued=2, free_slots=6)}
    snapshot = Snapshot(make_view(make_member("peer", load=told)), engines=engines, loop_lag_s=0.25)
    assert cluster("cluster_queue_depth", snapshot) == {("me",): 2, ("peer",): 7}
    assert cluster("cluster_free_slots", snapshot) == {("me",): 6, ("peer",): 1}
    assert cluster("cluster_loop_lag_seconds", snapshot) == {("me",): 0.25, ("peer",): 0.5}


def test_the_view_hash_is_of_those_who_are_there_whoever_looks() -> None:
    members = [make_member("a"), make_member("b", MemberStatus.SUSPECT)]
    one = make_view(*members, make_member("gone", MemberStatus.DEAD), make_member("left", MemberStatus.LEFT))
    other = ClusterView("a", 0.0, {member.node_id: member for member in (make_member("me"), *members)})
    assert cluster("cluster_view_hash", Snapshot(one)) == {(): one.hash()}
    assert one.hash() == other.hash()
    assert one.hash() != make_view(members[0]).hash()


def test_live_peers_that_told_of_another_view_disagree() -> None:
    own = make_view(make_member("same"), make_member("other"), make_member("old")).hash()
    view = make_view(
        make_member("same", load=NodeLoad(view_hash=own)),
        make_member("other", load=NodeLoad(view_hash=own + 1)),
        make_member("old", load=NodeLoad()),
        make_member("dead", MemberStatus.DEAD, load=NodeLoad(view_hash=own + 1)),
    )
    assert view.disagreeing() == ["other"]
    assert cluster("cluster_views_disagreeing", Snapshot(view)) == {(): 1}


def test_limits_of_keys_are_exported_with_their_use_and_how_many_keys_are_near_one() -> None:
    limits = [
        KeyLimit("sk-a", "requests", 10, 8),
        KeyLimit("sk-a", "tokens", 1000, 1000),
        KeyLimit("sk-b", "concurrency", 4, 3),
    ]
    snapshot = Snapshot(make_view(), limits=limits)
    assert cluster("cluster_api_key_limit", snapshot)[("sk-a", "requests")] == 10
    assert cluster("cluster_api_key_limit_used", snapshot)[("sk-b", "concurrency")] == 3
    assert cluster("cluster_api_keys_near_limit", snapshot) == {(): 1}


def test_keys_beyond_the_limit_of_labels_still_count_as_near_theirs() -> None:
    limits = [KeyLimit(f"sk-{i}", "requests", 10, 10) for i in range(LABEL_VALUES_MAX + 5)]
    snapshot = Snapshot(make_view(), limits=limits)
    assert len(cluster("cluster_api_key_limit", snapshot)) == LABEL_VALUES_MAX
    assert cluster("cluster_api_keys_near_limit", snapshot) == {(): LABEL_VALUES_MAX + 5}


@pytest.mark.parametrize(
    ("key", "figure", "name", "expected"),
    [
        pytest.param("forwards", 3, "ai_cluster_forwards_total", {(): 3}, id="counter without labels"),
        pytest.param("links", 2, "ai_cluster_links", {(): 2}, id="gauge without labels"),
        pytest.param("retries", {"NoCapacity": 1}, "ai_cluster_retries_total", {("NoCapacity",): 1}, id="one label"),
        pytest.param("retries", {}, "ai_cluster_retries_total", {}, id="nothing counted yet"),
        pytest.param(
            "gossip_packets",
            {("in", "ping"): 4, ("out", "ack"): 5},
            "ai_cluster_gossip_packets_total",
            {("in", "ping"): 4, ("out", "ack"): 5},
            id="two labels",
        ),
    ],
)
def test_a_figure_of_the_mesh_becomes_a_metric(key: str, figure: Figure, name: str, expected: Samples) -> None:
    assert rows(MeshCollector(Snapshot(make_view(), mesh={key: figure})).collect(), name) == expected


def test_dropped_log_lines_are_exported() -> None:
    metrics = MeshCollector(Snapshot(make_view(), log_lines_dropped=9)).collect()
    assert rows(metrics, "ai_cluster_log_lines_dropped_total") == {(): 9}


@pytest.mark.parametrize(
    ("figures", "error"),
    [
        pytest.param({"no_such_metric": 1}, KeyError, id="unknown key"),
        pytest.param({"retries": 1}, ValueError, id="label missing"),
        pytest.param({"forwards": {"x": 1}}, ValueError, id="label too many"),
        pytest.param({"forwards": "many"}, ValueError, id="no number"),
    ],
)
def test_a_figure_of_another_shape_is_refused(figures: dict[str, Figure], error: type[Exception]) -> None:
    with pytest.raises(error):
        list(MeshCollector(Snapshot(make_view(), mesh=figures)).collect())


class BrokenCollector(Collector):
    def collect(self) -> Iterable[Metric]:
        yield Metric("half_a_collection", "", "gauge")
        raise RuntimeError("broken")


def test_a_failing_collector_gives_nothing_and_is_counted() -> None:
    errors = Counter("errors", "", ["collector"], registry=None)
    guarded = GuardedCollector(BrokenCollector(), errors)
    assert list(guarded.collect()) == []
    assert list(guarded.collect()) == []
    assert rows(errors.collect(), "errors_total") == {("BrokenCollector",): 2}


@given(st.dictionaries(st.text(max_size=8), st.floats(allow_nan=False), max_size=8))
def test_every_reason_and_its_number_is_exported_as_given(counts: dict[str, float]) -> None:
    exported = rows(
        MeshCollector(Snapshot(make_view(), mesh={"retries": counts})).collect(), "ai_cluster_retries_total"
    )
    assert exported == {(reason,): count for reason, count in counts.items()}


def test_the_names_of_mesh_metrics_are_unique() -> None:
    keys = [family.key for family in MESH_FAMILIES]
    assert len(keys) == len(set(keys))


def test_the_portable_process_collector_has_the_names_of_the_native_one() -> None:
    native = {metric.name: metric.type for metric in ProcessCollector(registry=None).collect()}
    portable = {metric.name: metric.type for metric in PortableProcessCollector().collect()}
    if native:  # no /proc on this system
        assert portable.items() <= native.items()
    assert {"process_cpu_seconds", "process_resident_memory_bytes"} <= portable.keys()
    assert {"process_cpu_seconds", "process_resident_memory_bytes"} <= {m.name for m in process_collector().collect()}
