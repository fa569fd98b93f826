"""`ai-cluster up` as a person uses it: starts, answers, stops with one Ctrl-C, and leaves no process."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.cluster.mesh import wait_for


def free_ports(count: int) -> int:
    """The first of `count` consecutive ports that are free now, for UDP and TCP."""
    for first in range(20_000, 60_000, 50):
        try:
            for port in range(first, first + count):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    with socket.socket(socket.AF_INET, kind) as probe:
                        probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


@contextmanager
def local_mesh(folder: Path, nodes: int) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A running `ai-cluster up`, and its first HTTP port."""
    first = free_ports(2 * nodes)
    command = [sys.executable, "-m", "nodes", "up", "--nodes", str(nodes)]
    command += ["--http-port", str(first), "--mesh-port", str(first + nodes)]
    with open(folder / "output", "wb") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=environment())
    try:
        wait_for(lambda: "are ready" in text(folder), "the mesh is ready", 90, lambda: alive(process, folder))
        yield process, first
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}


def text(folder: Path) -> str:
    return (folder / "output").read_text()


def healthy_nodes(port: int) -> int:
    """As `ai-cluster status` tells it; its exit code says whether these are all."""
    status = subprocess.run(
        [sys.executable, "-m", "nodes", "status", "--url", f"http://127.0.0.1:{port}", "--json"],
        capture_output=True, text=True, timeout=60, check=False, env=environment(),
    )  # fmt: skip
    counts = json.loads(status.stdout)["nodes"]
    assert (status.returncode == 0) is (counts["degraded"] == counts["offline"] == 0)
    return int(counts["healthy"])


def alive(process: subprocess.Popen[bytes], folder: Path) -> None:
    assert process.poll() is None, text(folder)


def descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_one_ctrl_c_stops_all_and_leaves_no_process(tmp_path: Path) -> None:
    with local_mesh(tmp_path, 3) as (process, first):
        children = descendants(process)
        assert len(children) == 3
        answer = subprocess.run(
            [sys.executable, "-m", "nodes", "chat", "--url", f"http://127.0.0.1:{first + 2}", "How do I add a node?"],
            capture_output=True, text=True, timeout=60, check=True, env=environment(),
        )  # fmt: skip
        assert "ai-cluster serve --join" in answer.stdout
        # Each node is ready by its own word; that all know it of all takes gossip a moment more.
        wait_for(lambda: healthy_nodes(first) == 3, "all nodes are healthy in the status", 20)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE] == []
    assert "Traceback" not in text(tmp_path)
    ready = re.findall(r"^ai-cluster \| (node-\d) is ready \((\d of 3)\): (\S+)$", text(tmp_path), re.MULTILINE)
    assert [count for _, count, _ in ready] == ["1 of 3", "2 of 3", "3 of 3"]
    assert {(name, url) for name, _, url in ready} == {
        (f"node-{index}", f"http://127.0.0.1:{first + index - 1}") for index in (1, 2, 3)
    }
    assert re.search(r"^node-2 \| ", text(tmp_path), re.MULTILINE)
    logged = {json.loads(line)["node_id"] for line in (tmp_path / "logs" / "combined.log").read_text().splitlines()}
    assert logged == {"node-1", "node-2", "node-3"}
    assert (tmp_path / "logs" / "error.log").exists()


def test_a_parent_that_is_killed_leaves_no_node_behind(tmp_path: Path) -> None:
    with local_mesh(tmp_path, 2) as (process, _):
        children = descendants(process)
        process.kill()
        process.wait()
        wait_for(lambda: not any(child.is_running() for child in children), "the nodes stop by themselves", 20)


def test_the_mesh_goes_on_when_one_of_its_nodes_dies(tmp_path: Path) -> None:
    with local_mesh(tmp_path, 2) as (process, first):
        descendants(process)[1].kill()
        wait_for(lambda: "ended (signal 9)" in text(tmp_path), "the death is told", 10)
        assert process.poll() is None
        with socket.create_connection(("127.0.0.1", first), timeout=5):
            pass


def test_a_port_in_use_is_told_once_and_nothing_stays(tmp_path: Path) -> None:
    first = free_ports(6)
    with socket.create_server(("127.0.0.1", first + 1)):
        result = subprocess.run(
            [sys.executable, "-m", "nodes", "up", "--http-port", str(first), "--mesh-port", str(first + 3)],
            cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False, env=environment(),
        )  # fmt: skip
    assert result.returncode == 2
    assert f"127.0.0.1:{first + 1}" in result.stderr
    assert "--http-port" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
