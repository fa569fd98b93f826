"""docs/monitoring.md: each of its commands is run against three real nodes and a real Prometheus."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cluster.mesh import Mesh
from tests.observability.prometheus import SHIPPED, Prometheus, require_prometheus

PAGE = Path(__file__).parents[2] / "docs" / "monitoring.md"
REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 120
# Commands that go on until they are ended.
ENDLESS = ("tail -f ", "prometheus ")
ENDLESS_S = 3


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """(the folder where the page's commands work, what stands for the page's addresses)."""
    require_prometheus()
    folder = tmp_path_factory.mktemp("page")
    mesh, prometheus = Mesh(folder), Prometheus(folder)
    try:
        for _ in range(3):
            mesh.add()
        mesh.wait_until_agreed()
        (folder / "observability").symlink_to(REPOSITORY / "observability")
        (folder / "logs").symlink_to(mesh.nodes[0].folder / "logs")
        configuration = folder / "one.yml"
        target = {"job_name": "one", "static_configs": [{"targets": [mesh.nodes[0].http]}]}
        configuration.write_text(yaml.safe_dump({"global": {"scrape_interval": "1s"}, "scrape_configs": [target]}))
        prometheus.start(configuration)
        yield (
            folder,
            {
                "127.0.0.1:8080": mesh.nodes[0].http,
                "127.0.0.1:8081": mesh.nodes[1].http,
                "127.0.0.1:9090": prometheus.url.removeprefix("http://"),
            },
        )
    finally:
        prometheus.close()
        mesh.close()


@pytest.mark.parametrize("command", commands())
def test_the_command_works(command: str, places: tuple[Path, dict[str, str]]) -> None:
    folder, addresses = places
    for shown, real in addresses.items():
        command = command.replace(shown, real)
    command = re.sub(r"\bcurl ", "curl --fail ", command)
    is_endless = command.startswith(ENDLESS)
    if command.startswith("prometheus "):
        command += " --web.listen-address=127.0.0.1:0"  # 9090 may be taken
    run = (
        ["timeout", str(ENDLESS_S), *shlex.split(command)] if is_endless else ["bash", "-o", "pipefail", "-c", command]
    )
    done = subprocess.run(run, cwd=folder, capture_output=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == (124 if is_endless else 0), done.stdout + done.stderr
    is_quiet = command.endswith("error.log")  # healthy nodes have written nothing there
    assert is_quiet or done.stdout or done.stderr


def test_the_page_has_commands_and_names_every_alert() -> None:
    assert len(commands()) > 10
    alerts = {
        rule["alert"]
        for group in yaml.safe_load((SHIPPED / "alerts.yml").read_text())["groups"]
        for rule in group["rules"]
    }
    named = {
        name for row in re.findall(r"^\| ([A-Za-z, ]+) \| ", PAGE.read_text(), re.MULTILINE) for name in row.split(", ")
    }
    assert named - {"alert"} == alerts
