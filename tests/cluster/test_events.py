"""Who watches a real mesh hears what happens in it, and keeps no node from ending."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.cluster.mesh import Mesh, NodeProcess, wait_for
from tests.cluster.test_failover import Answer, executor


class Watcher:
    """Reads /cluster/events of a node in a thread until it ends."""

    def __init__(self, node: NodeProcess, query: str = "") -> None:
        self.events: list[dict[str, Any]] = []
        self.statuses: list[dict[str, Any]] = []
        self.has_ended = threading.Event()
        self._connection = http.client.HTTPConnection(node.http, timeout=60)
        self._connection.request("GET", f"/cluster/events{query}")
        self._response = self._connection.getresponse()
        assert self._response.status == 200
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def kinds(self) -> set[tuple[str, str]]:
        return {(event["kind"], event["node_id"]) for event in list(self.events)}

    def wait(self, kind: str, node_id: str) -> None:
        wait_for(lambda: (kind, node_id) in self.kinds(), f"{kind} {node_id} is told", 30)

    def _read(self) -> None:
        name = ""
        try:
            for line in self._response:
                if line.startswith(b"event: "):
                    name = line[7:].decode().strip()
                elif line.startswith(b"data: "):
                    (self.statuses if name == "status" else self.events).append(json.loads(line[6:]))
        except (OSError, http.client.HTTPException):
            pass
        finally:
            self._response.close()
            self._connection.close()
        self.has_ended.set()


@pytest.fixture
def watch(mesh: Mesh) -> Iterator[Callable[..., Watcher]]:
    watchers: list[Watcher] = []

    def start(node: NodeProcess, query: str = "") -> Watcher:
        watchers.append(Watcher(node, query))
        return watchers[-1]

    yield start
    mesh.close()  # which ends their streams
    for watcher in watchers:
        watcher.thread.join(10)


def test_a_watcher_hears_of_a_join_a_failover_a_death_and_a_return(mesh: Mesh, watch: Callable[..., Watcher]) -> None:
    entry = mesh.add("--no-model")
    watcher = watch(entry, "?status=1")
    second, third = mesh.add(), mesh.add()
    for node in (second, third):
        watcher.wait("joined", node.name)
        watcher.wait("model", node.name)
    mesh.wait_until_agreed()
    answer = Answer(entry, max_tokens=800)
    victim = executor(mesh, (entry,))
    other = next(node for node in (second, third) if node is not victim)
    victim.kill()
    assert answer.wait().is_done
    watcher.wait("failover", other.name)
    (move,) = [event for event in watcher.events if event["kind"] == "failover"]
    assert (move["origin"], move["reason"]) == (victim.name, "link")
    watcher.wait("dead", victim.name)
    wait_for(lambda: watcher.statuses[-1]["nodes"]["offline"] == 1, "the status follows", 5)
    victim.start(entry.mesh)
    watcher.wait("back", victim.name)
    late = watch(entry)  # who comes later hears of it too
    late.wait("failover", other.name)
    late.wait("dead", victim.name)


def test_every_node_tells_what_each_believes(mesh: Mesh) -> None:
    for _ in range(3):
        mesh.add("--no-model")
    mesh.wait_until_agreed()
    names = {node.name for node in mesh.nodes}
    for node in mesh.nodes:
        status, body = node.request("/cluster/views")
        views = json.loads(body)
        assert (status, set(views["views"]), views["silent"], views["disputed"]) == (200, names, [], [])
        assert all(told == dict.fromkeys(names, "alive") for told in views["views"].values())


def test_who_watches_keeps_no_node_from_ending(mesh: Mesh, watch: Callable[..., Watcher]) -> None:
    # A node that waited for its watchers would take longer than Mesh allows.
    node = mesh.add("--no-model", "--drain-s", "60")
    watchers = [watch(node, "?status=1"), watch(node)]
    assert node.stop() == 0
    for watcher in watchers:
        assert watcher.has_ended.wait(5)
