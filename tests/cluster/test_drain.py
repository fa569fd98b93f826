"""Nodes that are drained, stopped and restarted while clients ask them."""

from __future__ import annotations

import http.client
import socket

import trio

from nodes.messages import NODE_READY
from tests.cluster.mesh import Mesh, NodeProcess, wait_for
from tests.cluster.rolling import restart_all
from tests.cluster.test_failover import JSON, Answer, body
from tests.cluster.test_operators import run, succeed


def test_a_rolling_restart_under_load_costs_no_request(mesh: Mesh) -> None:
    for _ in range(2):
        mesh.add()
    mesh.wait_until_agreed()
    result = trio.run(restart_all, mesh, 6, 1.0)
    assert result.failures == []
    assert (result.failed, result.restarts) == (0, 2)
    assert result.requests > 0
    assert result.retried_connections > 0  # the restarts were noticed: addresses refused connections


def test_a_node_is_drained_for_maintenance_and_taken_back(mesh: Mesh) -> None:
    first, second = mesh.add(), mesh.add()
    mesh.wait_until_agreed()
    right = Answer(first, max_tokens=100).wait()
    answers = [Answer(second, max_tokens=100) for _ in range(4)]
    assert "node-2  ok  takes no requests, and none runs" in succeed(first, "drain", "node-2")
    assert {(answer.wait().text, answer.error) for answer in answers} == {(right.text, None)}
    table = succeed(first, "members")
    assert "draining" in table
    assert second.request("/health/ready")[0] == 503
    assert second.request("/health/live")[0] == 200
    assert "finish" not in run(second, "drain").stderr  # it can be repeated, also there

    connection = http.client.HTTPConnection(second.http, timeout=60)
    connection.request("POST", "/v1/chat/completions", body(max_tokens=4, stream=False, stream_options=None), JSON)
    response = connection.getresponse()
    assert (response.status, response.getheader("x-ai-cluster-node")) == (200, "node-1")
    assert response.getheader("connection") == "close"
    connection.close()

    assert "takes requests again" in succeed(second, "drain", "--undo")
    assert second.is_ready()
    wait_for(lambda: first.statuses()["node-2"] == "healthy", "the other node knows it", 5)
    assert run(first, "drain", "node-9").exit_code == 1


def test_an_idle_node_stops_fast_and_a_trickling_client_does_not_hold_it(mesh: Mesh) -> None:
    node = mesh.add("--no-model")
    trickling = socket.create_connection(tuple(node.http.rsplit(":", 1)), timeout=10)
    try:
        trickling.sendall(b"GET / HTT")
        assert node.stop() == 0
    finally:
        trickling.close()
    alone = NodeProcess(mesh.folder, "alone", "--no-model", "--drain-notice-s", "60", "--drain-s", "60")
    mesh.nodes.append(alone)
    alone.start(wait_until_ready=False)  # and so without a request
    log = alone.folder / "logs" / "combined.log"
    wait_for(lambda: log.exists() and NODE_READY in log.read_text(), "it is ready", 60)
    assert alone.stop() == 0  # within STOP_TIMEOUT_S, a third of its notice
