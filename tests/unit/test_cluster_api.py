"""/cluster, /metrics and what requests leave in them, over a scripted mesh."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mesh.view import Address, ClusterView, MemberStatus, NodeLoad, NodeProfile
from nodes.api.cluster import sd_targets
from tests.unit.scripted_api import Api, ScriptedDispatch, view
from tests.unit.test_collectors import make_member, make_view

TRACE = "0af7651916cd43dd8448eb211c80319c"


async def test_service_discovery_lists_everybody_who_has_not_left() -> None:
    def member(node_id: str, status: MemberStatus, port: int) -> tuple[str, object]:
        profile = NodeProfile(http_address=f"127.0.0.1:{port}")
        return node_id, replace(make_member(node_id, status), profile=profile)

    members = dict(
        [
            member("alive", MemberStatus.ALIVE, 8081),
            member("suspect", MemberStatus.SUSPECT, 8082),
            member("dead", MemberStatus.DEAD, 8083),
            member("left", MemberStatus.LEFT, 8084),
        ]
    )
    targets = sd_targets(ClusterView("alive", 0.0, members), "lab")  # type: ignore[arg-type]
    assert targets == [
        {
            "targets": [f"127.0.0.1:{port}"],
            "labels": {"__meta_ai_cluster_node": node_id, "__meta_ai_cluster_name": "lab"},
        }
        for node_id, port in (("alive", 8081), ("dead", 8083), ("suspect", 8082))
    ]


@pytest.mark.parametrize(
    ("http", "mesh", "target"),
    [
        ("10.0.0.1:8080", "10.0.0.9", "10.0.0.1:8080"),
        ("0.0.0.0:8080", "10.0.0.9", "10.0.0.9:8080"),
        ("[::]:8080", "10.0.0.9", "10.0.0.9:8080"),
        ("[::]:8080", "fd00::9", "[fd00::9]:8080"),
        ("[fd00::1]:8080", "fd00::9", "[fd00::1]:8080"),
        ("box.lan:8080", "10.0.0.9", "box.lan:8080"),
    ],
)
def test_a_target_is_where_a_node_can_be_reached(http: str, mesh: str, target: str) -> None:
    member = make_member("peer", profile=NodeProfile(http_address=http), address=Address(mesh, 7946))
    assert [group["targets"] for group in sd_targets(make_view(member), "lab")] == [[target]]


async def test_a_mesh_whose_addresses_are_unknown_gives_no_targets_with_status_200() -> None:
    cluster = make_view(make_member("peer"))  # neither has told its address yet
    response = await Api(ScriptedDispatch(), cluster).client.get("/cluster/sd")
    assert (response.status_code, response.json()) == (200, [])
    assert response.headers["content-type"] == "application/json"


async def test_the_status_names_who_disagrees() -> None:
    cluster = make_view(make_member("peer", load=NodeLoad(view_hash=1)))
    status = (await Api(ScriptedDispatch(), cluster).client.get("/cluster/status")).json()
    assert status["views_disagreeing"] == ["peer"]
    assert status["view_hash"] == cluster.hash()
    rows = {row["node_id"]: row for row in status["members"]}
    assert rows["peer"]["view_hash"] == 1
    assert rows["me"]["view_hash"] == cluster.hash()
    assert {"age_s", "load_age_s", "loop_lag_s", "version", "models", "active_requests"} <= rows["peer"].keys()


async def test_metrics_say_how_they_are_packed() -> None:
    client = Api(ScriptedDispatch()).client
    plain = await client.get("/metrics", headers={"accept-encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert plain.headers["vary"] == "accept, accept-encoding"
    async with client.stream("GET", "/metrics", headers={"accept-encoding": "gzip"}) as packed:
        assert packed.headers["content-encoding"] == "gzip"
    assert (await client.get("/metrics/cluster")).text == "cluster metrics\n"


@pytest.mark.parametrize(
    ("traceparent", "trace_id"),
    [
        pytest.param(f"00-{TRACE}-00f067aa0ba902b7-01", TRACE, id="as the standard has it"),
        pytest.param(f"cc-{TRACE}-00f067aa0ba902b7-01-more", TRACE, id="of a later version"),
        pytest.param(f"00-{'0' * 32}-00f067aa0ba902b7-01", "", id="zeros"),
        pytest.param(f"00-{TRACE.upper()}-00f067aa0ba902b7-01", "", id="capitals"),
        pytest.param("nonsense", "", id="nonsense"),
    ],
)
async def test_the_trace_of_a_request_is_in_its_exemplar(traceparent: str, trace_id: str) -> None:
    api = Api(ScriptedDispatch(), view())
    await api.client.get("/health", headers={"traceparent": traceparent, "x-request-id": "r-1"})
    assert api.metrics.exemplars == [{"request_id": "r-1", "trace_id": trace_id}]
