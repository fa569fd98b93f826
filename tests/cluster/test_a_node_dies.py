"""SIGKILL, restart and drain of one node of three, under load."""

from __future__ import annotations

import http.client
import json
import socket
import threading

from tests.cluster.mesh import Mesh, NodeProcess, wait_for

JSON = {"content-type": "application/json"}
BODY = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "Is there a master?"}], "temperature": 0})


def ask(node: NodeProcess) -> int:
    """HTTP status of one plain completion; 0 without an answer."""
    connection = http.client.HTTPConnection(node.http, timeout=60)
    try:
        connection.request("POST", "/v1/chat/completions", BODY, JSON)
        response = connection.getresponse()
        response.read()
        return response.status
    except OSError:
        return 0
    finally:
        connection.close()


class Load:
    """Threads that ask one node over and over until stopped."""

    def __init__(self, node: NodeProcess, threads: int) -> None:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(node,)) for _ in range(threads)]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, node: NodeProcess) -> None:
        while not self._stop.is_set():
            ask(node)


def test_a_killed_node_costs_no_later_request_and_comes_back(mesh: Mesh) -> None:
    first, second, third = (mesh.add() for _ in range(3))
    mesh.wait_until_agreed()
    with Load(first, threads=6):
        third.kill()
        statuses = [ask((first, second)[i % 2]) for i in range(100)]
        assert statuses == [200] * 100
        for survivor in (first, second):
            wait_for(lambda node=survivor: node.statuses()["node-3"] == "offline", "the dead node is offline", 10)
            wait_for(
                lambda node=survivor: node.metric("ai_cluster_cluster_nodes_total", status="offline") == 1,
                "the metric says so",
                10,
            )
    third.start(first.mesh)
    mesh.wait_until_agreed(5)
    assert ask(third) == 200


def test_sigterm_lets_streams_finish_and_the_node_leaves(mesh: Mesh) -> None:
    first, second = mesh.add(), mesh.add("--drain-s", "20")
    mesh.wait_until_agreed()
    first.kill()  # so that the stream is executed by the node that will be stopped
    connection = http.client.HTTPConnection(second.http, timeout=60)
    body = json.dumps(
        {
            "model": "demo",
            "messages": [{"role": "user", "content": "What is AI Cluster?"}],
            "stream": True,
            "ignore_eos": True,
            "max_tokens": 400,
        }
    )
    connection.request("POST", "/v1/chat/completions", body, JSON)
    response = connection.getresponse()
    assert response.status == 200
    response.read(10)
    assert second.stop() == 0
    assert response.read().endswith(b"data: [DONE]\n\n")
    connection.close()


def test_a_node_that_leaves_is_no_longer_counted(mesh: Mesh) -> None:
    first, second = mesh.add(), mesh.add()
    mesh.wait_until_agreed()
    assert second.stop() == 0
    wait_for(lambda: first.status()["nodes"]["healthy"] == 1, "the leave has arrived", 5)
    assert first.status()["nodes"] == {"healthy": 1, "degraded": 0, "offline": 0}


def test_a_node_that_lost_its_data_directory_learns_its_generation_from_peers(mesh: Mesh) -> None:
    first, second = mesh.add("--no-model"), mesh.add("--no-model")
    mesh.wait_until_agreed()
    for _ in range(2):
        second.kill()
        second.start(first.mesh)
    generation_file = second.folder / "data" / "generation"
    assert int(generation_file.read_text()) == 3
    second.kill()
    generation_file.unlink()
    second.start(first.mesh)
    mesh.wait_until_agreed(10)
    wait_for(lambda: int(generation_file.read_text()) > 3, "the generation is kept", 5)


def test_a_client_that_reads_nothing_does_not_hold_up_the_end_of_a_node(mesh: Mesh) -> None:
    node = mesh.add("--no-model", "--drain-s", "1")
    host, port = node.http.split(":")
    with socket.socket() as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.connect((host, int(port)))
        silent.sendall(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n" * 300)
        wait_for(lambda: node.metric("ai_cluster_http_requests_total", path="/metrics") >= 3, "it is being served", 10)
        assert node.stop() == 0
