"""A mesh that is really cut in two, in network namespaces, under a Prometheus that still reaches every node.

Two nodes and Prometheus live in one namespace, the third node in another. Mesh and HTTP have a cable each, so that the
one can be pulled alone. Nothing of the machine's own network is touched. Needs root, and `ip` of iproute2.
"""

from __future__ import annotations

import base64
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.mesh import NodeProcess, wait_for
from tests.observability.prometheus import Prometheus, fast_configuration, require_prometheus

HUB_MESH, FAR_MESH = "10.99.1.1", "10.99.1.2"
HUB_HTTP, FAR_HTTP = "10.99.2.1", "10.99.2.2"
WAIT_S = 60.0


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Namespaces:
    """`hub` and `far`, joined by the cables `mesh` and `http`."""

    def __init__(self) -> None:
        self.hub, self.far = f"aic-hub-{os.getpid()}", f"aic-far-{os.getpid()}"

    def open(self) -> None:
        for name in (self.hub, self.far):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        for cable, near, far in (("mesh", HUB_MESH, FAR_MESH), ("http", HUB_HTTP, FAR_HTTP)):
            ip("-n", self.hub, "link", "add", cable, "type", "veth", "peer", "name", cable, "netns", self.far)
            for name, address in ((self.hub, near), (self.far, far)):
                ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
                ip("-n", name, "link", "set", cable, "up")

    def close(self) -> None:
        for name in (self.hub, self.far):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def inside(self, name: str) -> tuple[str, ...]:
        return ("ip", "netns", "exec", name)

    def pull(self, cable: str) -> None:
        ip("-n", self.hub, "link", "set", cable, "down")

    def plug_in(self, cable: str) -> None:
        ip("-n", self.hub, "link", "set", cable, "up")


@pytest.fixture
def namespaces() -> Iterator[Namespaces]:
    require_prometheus()
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root, and ip of iproute2")
    made = Namespaces()
    try:
        made.open()
    except subprocess.CalledProcessError as error:
        made.close()
        pytest.skip(f"no network namespaces here: {error.stderr.decode()}")
    yield made
    made.close()


@pytest.fixture
def watched(namespaces: Namespaces, tmp_path: Path) -> Iterator[Prometheus]:
    """Prometheus over the three nodes, all of them ready."""
    key_file = tmp_path / "key"
    key_file.write_text(base64.b64encode(secrets.token_bytes(32)).decode())
    key_file.chmod(0o600)
    places = [(namespaces.hub, HUB_HTTP, HUB_MESH)] * 2 + [(namespaces.far, FAR_HTTP, FAR_MESH)]
    nodes: list[NodeProcess] = []
    prometheus = Prometheus(tmp_path, namespaces.inside(namespaces.hub))
    try:
        for index, (name, http, mesh) in enumerate(places, 1):
            options = ("--cluster-key-file", str(key_file), "--open")
            node = NodeProcess(tmp_path, f"node-{index}", *options, prefix=namespaces.inside(name))
            node.http, node.mesh = f"{http}:0", f"{mesh}:0"
            nodes.append(node)
            node.start(*(other.mesh for other in nodes[:1] if other is not node), wait_until_ready=False)
        addresses = {"localhost:8080": nodes[0].http, "127.0.0.1:8080": nodes[0].http, "localhost:8081": nodes[1].http}
        addresses |= {"127.0.0.1:8081": nodes[1].http, "localhost:8082": nodes[2].http}
        addresses |= {"localhost:8083": nodes[2].http, "localhost:9090": "127.0.0.1:9"}
        prometheus.start(fast_configuration(tmp_path, addresses))
        yield prometheus
    finally:
        prometheus.close()
        for node in nodes:
            node.close()


def test_a_cut_mesh_is_told_of_while_every_node_answers_and_heals(namespaces: Namespaces, watched: Prometheus) -> None:
    healthy = 'min(ai_cluster_cluster_nodes_total{status="healthy"})'
    views = "cluster:ai_cluster_views:count"
    wait_for(lambda: watched.value(healthy) == 3 and watched.value(views) == 1, "all see all", WAIT_S)
    wait_for(lambda: not watched.firing(), "nothing is wrong", WAIT_S)

    namespaces.pull("mesh")
    wait_for(lambda: {"ViewsDisagree", "NodesDown", "GossipStale"} <= watched.firing(), "the cut is told of", WAIT_S)
    assert watched.value(views) == 2
    assert watched.value('count(up{job=~"ai-cluster.*"} == 1)') == 3
    assert watched.firing() == {"ViewsDisagree", "NodesDown", "GossipStale"}

    namespaces.plug_in("mesh")
    wait_for(lambda: watched.value(healthy) == 3 and watched.value(views) == 1, "all see all again", WAIT_S)
    wait_for(lambda: not watched.firing(), "the alerts end", WAIT_S)
