"""Real nodes as real processes for tests: each on ports the kernel gives it, each ended by its own process id."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 20.0
POLL_S = 0.05


class NodeProcess:
    """One `ai-cluster serve`. Its http and mesh addresses are known once start() returned.

    prefix: what runs a command elsewhere, such as in a network namespace; the process id must stay its own."""

    def __init__(
        self,
        folder: Path,
        name: str,
        *options: str,
        environment: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
        host: str = "127.0.0.1",
    ) -> None:
        self.name = name
        self.folder = folder / name
        self.options = options
        self.http = ""
        self.mesh = ""
        self._environment = environment or {}
        self._prefix = prefix
        self._host = host
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *join: str, wait_until_ready: bool = True) -> NodeProcess:
        """Start the node; a restart keeps its addresses and its data directory."""
        self.folder.mkdir(parents=True, exist_ok=True)
        address_file = self.folder / "data" / "node.json"
        address_file.unlink(missing_ok=True)
        command = [*self._prefix, sys.executable, "-m", "nodes", "serve", "--name", self.name]
        command += ["--http", self.http or f"{self._host}:0", "--mesh", self.mesh or f"{self._host}:0"]
        command += ["--data-dir", str(self.folder / "data"), "--log-dir", str(self.folder / "logs")]
        command += ["--threads", "1", "--no-spinning", "--drain-s", "5", *self.options]
        for address in join:
            command += ["--join", address]
        with open(self.folder / "stderr", "ab") as stderr:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stderr=stderr, env=os.environ | self._environment
            )
        wait_for(address_file.exists, f"{self.name} binds its ports", START_TIMEOUT_S, self._check_alive)
        addresses = json.loads(address_file.read_text())
        self.http, self.mesh = addresses["http"], addresses["mesh"]
        if wait_until_ready:
            wait_for(self.is_ready, f"{self.name} is ready", START_TIMEOUT_S, self._check_alive)
        return self

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """SIGTERM, then the exit code; a node that does not end by itself fails the test."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(STOP_TIMEOUT_S)

    def wait(self) -> int:
        """The exit code of a node that was told to end some other way."""
        assert self._process is not None
        return self._process.wait(STOP_TIMEOUT_S)

    def close(self) -> None:
        """End it whatever happened."""
        if self._process is not None and self._process.poll() is None:
            self.kill()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def url(self) -> str:
        return f"http://{self.http}"

    def is_ready(self) -> bool:
        return self.request("/health/ready")[0] == 200

    def request(self, path: str, timeout_s: float = 10.0) -> tuple[int, bytes]:
        """(status, body) of a GET; status 0 when there is no answer."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=timeout_s) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError:
            return 0, b""

    def status(self) -> dict[str, Any]:
        status, body = self.request("/cluster/status")
        assert status == 200, body
        answer: dict[str, Any] = json.loads(body)
        return answer

    def statuses(self) -> dict[str, str]:
        """node id → healthy, degraded or offline, as this node sees it."""
        return {member["node_id"]: member["status"] for member in self.status()["members"]}

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of that name whose labels include these; 0.0 when there are none."""
        from prometheus_client.parser import text_string_to_metric_families

        text = self.request("/metrics")[1].decode()
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def _check_alive(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            raise AssertionError(f"{self.name} ended with {self._process.returncode}: {self.stderr()[-2000:]}")


class Mesh:
    """Nodes that know each other, ended together."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nodes: list[NodeProcess] = []

    def add(self, *options: str, name: str | None = None, environment: dict[str, str] | None = None) -> NodeProcess:
        """Start one more node that joins the first."""
        node = NodeProcess(self.folder, name or f"node-{len(self.nodes) + 1}", *options, environment=environment)
        self.nodes.append(node)
        return node.start(*(other.mesh for other in self.nodes[:1] if other is not node))

    def wait_until_agreed(self, timeout_s: float = 30.0) -> None:
        """Until every node sees every node healthy."""
        expected = {node.name: "healthy" for node in self.nodes}
        wait_for(lambda: all(node.statuses() == expected for node in self.nodes), "all see all healthy", timeout_s)

    def close(self) -> None:
        for node in self.nodes:
            node.close()


def wait_for(
    condition: Callable[[], bool], what: str, timeout_s: float, check: Callable[[], None] | None = None
) -> float:
    """Poll until the condition holds; the seconds it took. AssertionError that says what did not happen."""
    started = time.monotonic()
    while not condition():
        if check is not None:
            check()
        if time.monotonic() - started > timeout_s:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(POLL_S)
    return time.monotonic() - started
