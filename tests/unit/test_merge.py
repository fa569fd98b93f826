"""Many nodes' expositions as one."""

from __future__ import annotations

import gzip
from collections.abc import Mapping

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from mesh.errors import PeerUnavailable
from mesh.view import MemberStatus, MemberView
from nodes.cluster_metrics import PEER_TIMEOUT_S, ClusterMetrics
from observability.merge import merge
from observability.metrics import Exposition
from tests.unit.test_collectors import make_member, make_view

TEXT = """# HELP x_total Things.
# TYPE x_total counter
x_total 3.0
# HELP y_seconds Times.
# TYPE y_seconds histogram
y_seconds_bucket{le="+Inf",model="a b} c"} 2.0
y_seconds_count{model="a b} c"} 2.0
# HELP ai_cluster_model_memory_bytes Memory.
# TYPE ai_cluster_model_memory_bytes gauge
ai_cluster_model_memory_bytes{model="m",node_id="own"} 7.0
# HELP ai_cluster_cluster_nodes_total Members.
# TYPE ai_cluster_cluster_nodes_total gauge
ai_cluster_cluster_nodes_total{status="healthy"} 2.0
# HELP ai_cluster_cluster_active_requests Generations.
# TYPE ai_cluster_cluster_active_requests gauge
ai_cluster_cluster_active_requests{node_id="subject"} 1.0
"""


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def row(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def test_every_sample_has_the_node_it_is_of() -> None:
    merged = samples(merge("b", {"a": TEXT, "b": TEXT.replace("3.0", "4.0")}, {"a": True, "b": True, "c": False}))
    assert merged[row("x_total", node_id="a")] == 3.0
    assert merged[row("x_total", node_id="b")] == 4.0
    assert merged[row("y_seconds_count", model="a b} c", node_id="a")] == 2.0
    assert merged[row("ai_cluster_model_memory_bytes", model="m", node_id="own")] == 7.0
    up = {name: value for (name, labels), value in merged.items() if name == "ai_cluster_cluster_scrape_up"}
    assert up
    assert merged[row("ai_cluster_cluster_scrape_up", node_id="c")] == 0.0
    assert merged[row("ai_cluster_cluster_scrape_up", node_id="a")] == 1.0


def test_of_views_of_the_cluster_the_asked_nodes_is_whole_and_others_say_what_is_of_themselves() -> None:
    merged = samples(merge("b", {"a": TEXT.replace("subject", "from-a"), "b": TEXT}, {}))
    assert merged[row("ai_cluster_cluster_nodes_total", status="healthy", node_id="a")] == 2.0
    assert merged[row("ai_cluster_cluster_active_requests", node_id="subject")] == 1.0
    assert row("ai_cluster_cluster_active_requests", node_id="from-a") not in merged


@pytest.mark.parametrize(
    "bad",
    ["x_total", "{}", "other_total 3.0", 'x_total{a="b"}3', "# TYPE nonsense", "\x00", "x_total 3.0 extra words"],
)
def test_what_is_no_sample_of_its_family_is_left_out(bad: str) -> None:
    text = f"# TYPE x_total counter\n{bad}\nx_total 1.0\n"
    assert samples(merge("a", {"a": text}, {})) == {row("x_total", node_id="a"): 1.0}


def test_a_node_id_within_a_value_is_no_label() -> None:
    text = '# TYPE x gauge\nx{model="m,node_id=\\"evil\\""} 1.0\n'
    assert samples(merge("a", {"a": text}, {})) == {row("x", model='m,node_id="evil"', node_id="a"): 1.0}


class Peers:
    """What each peer answers: bytes, an error, or nothing for ever."""

    def __init__(self, answers: Mapping[str, bytes | Exception | None], *members: MemberView) -> None:
        self.answers = answers
        self.metrics = ClusterMetrics(view=lambda: make_view(*members), ask=self.ask, render=self.render)

    async def ask(self, member: MemberView, question: bytes) -> bytes:
        answer = self.answers[member.node_id]
        if answer is None:
            await trio.sleep_forever()
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, bytes)
        return answer

    async def render(self, accept: str, accept_encoding: str) -> Exposition:
        body = TEXT.encode()
        return Exposition("text/plain", gzip.compress(body) if accept_encoding else body)

    async def up(self) -> dict[str, float]:
        found = samples((await self.metrics.render("")).body.decode())
        return {dict(labels)["node_id"]: v for (name, labels), v in found.items() if name.endswith("scrape_up")}


async def test_peers_that_do_not_answer_well_are_told_of_and_cost_their_metrics_alone() -> None:
    good = gzip.compress(TEXT.encode())
    peers = Peers(
        {"good": good, "gone": PeerUnavailable("gone"), "odd": b"no gzip", "binary": gzip.compress(b"\xff")},
        *(make_member(name) for name in ("good", "gone", "odd", "binary")),
        make_member("dead", MemberStatus.DEAD),
        make_member("left", MemberStatus.LEFT),
    )
    assert await peers.up() == {"me": 1, "good": 1, "gone": 0, "odd": 0, "binary": 0, "dead": 0}


async def test_a_node_answers_a_peer_with_its_own_metrics() -> None:
    answer = await Peers({}).metrics.answer(b"")
    assert gzip.decompress(answer).decode() == TEXT


async def test_a_hanging_peer_is_waited_for_until_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nodes.cluster_metrics.PEER_TIMEOUT_S", 0.05)
    peers = Peers({"slow": None}, make_member("slow"))
    assert await peers.up() == {"me": 1, "slow": 0}
    assert PEER_TIMEOUT_S < 10  # Prometheus's usual scrape timeout
