"""What cannot run says so in one line, with exit code 2 and no traceback."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nodes.config import BUILTIN_MODEL
from tests.cluster.mesh import Mesh, wait_for

OTHER_KEY = base64.b64encode(b"k" * 32).decode()


def serve(folder: Path, *options: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nodes", "serve", "--http", "127.0.0.1:0", "--mesh", "127.0.0.1:0"]
    command += ["--data-dir", str(folder / "data"), "--log-dir", str(folder / "logs"), *options]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=os.environ | (environment or {}), check=False
    )


def assert_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("ai-cluster: ")
    assert [word for word in words if word not in lines[0]] == []


def test_a_missing_model_folder_is_named(tmp_path: Path) -> None:
    assert_refused(serve(tmp_path, "--model", str(tmp_path / "absent")), str(tmp_path / "absent"))


@pytest.mark.parametrize("file", ["model.onnx", "tokenizer.json", "genai_config.json"])
@pytest.mark.parametrize("damage", ["missing", "garbage"])
def test_a_broken_model_folder_is_named_with_the_file(tmp_path: Path, file: str, damage: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(BUILTIN_MODEL, model)
    (model / file).unlink()
    if damage == "garbage":
        (model / file).write_bytes(b"\x00garbage")
    assert_refused(serve(tmp_path, "--model", str(model)), str(model), file)


@pytest.mark.parametrize("kind", ["http", "mesh"])
def test_a_port_in_use_is_named(tmp_path: Path, kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert_refused(serve(tmp_path, f"--{kind}", address), address, "in use", f"--{kind}")


def test_a_bad_configuration_key_is_named(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text("slotz = 3\n")
    assert_refused(serve(tmp_path, "--config", str(file)), "slotz", "slots")


def test_a_mesh_off_loopback_without_a_key_is_refused(tmp_path: Path) -> None:
    assert_refused(serve(tmp_path, "--mesh", "0.0.0.0:0"), "cluster key", "keyring new")


def test_a_data_directory_in_use_is_named(mesh: Mesh, tmp_path: Path) -> None:
    node = mesh.add("--no-model")
    result = serve(tmp_path, "--no-model", "--data-dir", str(node.folder / "data"))
    assert_refused(result, "in use", str(node.pid), "--data-dir")


def test_a_key_that_every_seed_refuses_ends_the_node(mesh: Mesh, tmp_path: Path) -> None:
    seed = mesh.add("--no-model")
    environment = {"AI_CLUSTER_KEY": OTHER_KEY}
    result = serve(tmp_path, "--no-model", "--join", seed.mesh, environment=environment)
    assert_refused(result, seed.mesh, "cluster key")
    assert "node-1" not in result.stderr


def test_an_unreachable_seed_is_retried_and_logged(mesh: Mesh) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        absent = f"127.0.0.1:{taken.getsockname()[1]}"
    node = mesh.add("--no-model", "--join", absent)
    log = node.folder / "logs" / "combined.log"

    def is_logged() -> bool:
        records = [json.loads(line) for line in log.read_text().splitlines()]
        return any(absent in json.dumps(record) and record["level"] == "warning" for record in records)

    wait_for(is_logged, "the log names the unreachable seed", 15)
    assert node.is_ready()


def test_datagrams_and_links_under_another_key_are_counted_and_dropped(mesh: Mesh) -> None:
    node = mesh.add("--no-model")
    host, port = node.mesh.split(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        for data in (b"", b"x", b"\x01" + b"k" * 60, b"z" * 1200, b"y" * 9000):
            udp.sendto(data, (host, int(port)))
    with socket.create_connection((host, int(port)), timeout=10) as tcp:
        tcp.sendall(b"GET / HTTP/1.1\r\n\r\n" + b"x" * 2000)
        tcp.settimeout(15)
        while tcp.recv(4096):  # the node answers with a refusal or nothing, and closes
            pass
    wait_for(lambda: node.metric("ai_cluster_gossip_rejected_total") >= 4, "rejected datagrams are counted", 5)
    assert node.is_ready()


def test_an_entry_without_models_forwards(mesh: Mesh) -> None:
    mesh.add()
    entry = mesh.add("--no-model")
    mesh.wait_until_agreed()
    status, body = entry.request("/v1/models")
    assert status == 200
    assert [model["id"] for model in json.loads(body)["data"]] == ["demo"]


@pytest.mark.parametrize("seed", [0, 1], ids=["through itself", "through another"])
def test_a_second_node_under_a_living_name_is_refused_and_the_first_one_stays(
    mesh: Mesh, tmp_path: Path, seed: int
) -> None:
    nodes = [mesh.add("--no-model"), mesh.add("--no-model")]
    mesh.wait_until_agreed()
    result = serve(tmp_path, "--no-model", "--name", nodes[0].name, "--join", nodes[seed].mesh)
    assert_refused(result, nodes[0].name, "--name")
    mesh.wait_until_agreed()


def test_tracing_without_its_extra_names_the_package_to_install(tmp_path: Path) -> None:
    absent = tmp_path / "absent" / "opentelemetry"
    absent.mkdir(parents=True)
    (absent / "__init__.py").write_text("raise ModuleNotFoundError('No module', name='opentelemetry')\n")
    path = os.pathsep.join([str(absent.parent), os.environ.get("PYTHONPATH", "")])
    result = serve(tmp_path, "--tracing-endpoint", "http://127.0.0.1:4318", environment={"PYTHONPATH": path})
    assert_refused(result, "tracing_endpoint", "pip install -e '.[tracing]'")


def test_a_file_of_headers_for_the_collector_that_is_missing_is_named(tmp_path: Path) -> None:
    options = ("--tracing-endpoint", "http://127.0.0.1:4318", "--tracing-headers-file", str(tmp_path / "absent"))
    assert_refused(serve(tmp_path, *options), "tracing_headers_file", str(tmp_path / "absent"))


def test_a_node_that_does_not_trace_never_imports_opentelemetry() -> None:
    program = "import sys, nodes.process; print([name for name in sys.modules if name.startswith('opentelemetry')])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"
