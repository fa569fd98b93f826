"""The nodes of deploy/compose without containers: the same command and environment, on this machine."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster.mesh import START_TIMEOUT_S, NodeProcess, wait_for
from tests.compose_file import FOLDER, ROOT, compose, health_command, image_command, image_environment, node_services

CHECK_TIMEOUT_S = 60


class ComposedNode(NodeProcess):
    """A service's container as a process."""

    def __init__(self, folder: Path, name: str, settings: dict[str, str]) -> None:
        super().__init__(folder, name)
        self.settings = settings

    def start_composed(self) -> None:
        command = [sys.executable, "-m", "nodes", *image_command()[1:]]
        own = {name: value for name, value in os.environ.items() if not name.startswith("AI_CLUSTER_")}
        self.folder.mkdir(parents=True)
        with open(self.folder / "stderr", "ab") as stderr:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=stderr, env=own | self.settings)
        file = self.folder / "data" / "node.json"
        wait_for(file.exists, f"{self.name} binds its ports", START_TIMEOUT_S, self._check_alive)
        addresses = json.loads(file.read_text())
        self.http, self.mesh = addresses["http"], addresses["mesh"]
        wait_for(self.is_ready, f"{self.name} is ready", START_TIMEOUT_S, self._check_alive)


def on_this_machine(
    settings: dict[str, str], folder: Path, name: str, key_file: Path, known: list[str]
) -> dict[str, str]:
    """What differs without containers: ports are the kernel's, folders the test's, names the addresses behind them."""
    places = {
        "AI_CLUSTER_HTTP": "127.0.0.1:0",
        "AI_CLUSTER_MESH": "127.0.0.1:0",
        "AI_CLUSTER_JOIN": ",".join(known),
        "AI_CLUSTER_DATA_DIR": str(folder / name / "data"),
        "AI_CLUSTER_LOG_DIR": str(folder / "logs" / Path(settings["AI_CLUSTER_LOG_DIR"]).name),
        "AI_CLUSTER_CLUSTER_KEY_FILE": str(key_file),
    }
    assert places.keys() <= settings.keys()
    kept = {key: value for key, value in settings.items() if key != "AI_CLUSTER_ADVERTISE"}  # no name for it here
    return kept | places


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[dict[str, ComposedNode]]:
    key_file = tmp_path / "cluster.key"
    key_file.write_text(b64encode(secrets.token_bytes(32)).decode())
    started: dict[str, ComposedNode] = {}
    try:
        for name, service in node_services(compose({"GRAFANA_PASSWORD": "x"})).items():
            known = [node.mesh for node in started.values()]
            settings = image_environment() | service["environment"]
            settings = on_this_machine(settings, tmp_path, name, key_file, known)
            started[name] = ComposedNode(tmp_path, name, settings)
            started[name].start_composed()
        yield started
    finally:
        for node in started.values():
            node.close()


def test_the_nodes_of_compose_form_a_mesh_that_its_prometheus_and_alloy_find(
    nodes: dict[str, ComposedNode], tmp_path: Path
) -> None:
    healthy = dict.fromkeys(nodes, "healthy")
    wait_for(lambda: all(node.statuses() == healthy for node in nodes.values()), "all see all healthy", START_TIMEOUT_S)

    jobs = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    targets = [target for job in jobs for group in job["static_configs"] for target in group["targets"]]
    services = [target.split(":")[0] for target in targets if not target.startswith("localhost:")]
    assert sorted(services) == sorted(nodes)
    for service in services:
        status, body = nodes[service].request("/metrics")
        assert status == 200
        families = text_string_to_metric_families(body.decode())
        samples = [sample for family in families for sample in family.samples if sample.name == "ai_cluster_node_info"]
        assert [sample.labels["node_id"] for sample in samples] == [service]
        assert nodes[service].metric("ai_cluster_cluster_nodes_total", status="healthy") == len(nodes)

    for name, node in nodes.items():
        check = [part.replace("127.0.0.1:8080", node.http) for part in health_command()]
        assert any(node.http in part for part in check)
        subprocess.run([sys.executable, *check[1:]], check=True, timeout=CHECK_TIMEOUT_S)
        lines = (tmp_path / "logs" / name / "combined.log").read_text().splitlines()
        assert {json.loads(line)["node_id"] for line in lines} == {name}

    # A key is demanded: the HTTP port of a container is off loopback. Here it is on it, so only the setting tells.
    assert all("AI_CLUSTER_OPEN" not in node.settings for node in nodes.values())
    assert [node.stop() for node in nodes.values()] == [0, 0, 0]


def test_prometheus_takes_the_configuration_with_the_rules_that_are_mounted(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        message = "promtool not found: apt-get install prometheus"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    for mount in compose({"GRAFANA_PASSWORD": "x"})["services"]["prometheus"]["volumes"]:
        source, target, *_ = mount.split(":")
        if source.startswith("."):
            place = tmp_path / Path(target).relative_to("/etc/prometheus")
            place.symlink_to((FOLDER / source).resolve())
    command = ["promtool", "check", "config", str(tmp_path / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "ai-cluster" / "alerts.yml").resolve() == ROOT / "observability" / "prometheus" / "alerts.yml"
