"""Operators at work on real nodes: keys rotated under load; members shown, joined, stopped, forgotten; the token."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import stat
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from mesh.forwarder import REKEY_GRACE_S
from mesh.seal import DEVELOPMENT_KEY, DatagramSealer, Keyring, key_id
from nodes import cli
from tests.cluster.mesh import Mesh, NodeProcess, wait_for
from tests.cluster.test_faults_at_start import assert_refused, serve

NEW_KEY = bytes(range(32))
OLD_ID, NEW_ID = key_id(DEVELOPMENT_KEY).hex(), key_id(NEW_KEY).hex()
JSON = {"content-type": "application/json"}
STREAM = json.dumps(
    {
        "model": "demo",
        "messages": [{"role": "user", "content": "What is AI Cluster?"}],
        "stream": True,
        "ignore_eos": True,
        "max_tokens": 60,
    }
)


def run(node: NodeProcess, *command: str, data_dir: Path | None = None) -> Result:
    """One ai-cluster command, asked of that node."""
    options = ["--url", node.url, "--data-dir", str(data_dir or node.folder / "data")]
    return CliRunner().invoke(cli.app, [*command, *options])


def succeed(node: NodeProcess, *command: str) -> str:
    result = run(node, *command)
    assert result.exit_code == 0, result.output
    return result.stdout


def admin(node: NodeProcess, path: str, token: str | None, body: object = None) -> int:
    """The status of a request to /admin."""
    headers = JSON | ({} if token is None else {"authorization": f"Bearer {token}"})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(node.url + path, data, headers), timeout=20) as response:
            response.read()
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture
def new_key_file(tmp_path: Path) -> Path:
    file = tmp_path / "new.key"
    file.write_text(base64.b64encode(NEW_KEY).decode() + "\n")
    file.chmod(0o600)
    return file


class Streams:
    """One stream after the other at each node, until stopped. faults: what a client saw of a stream that broke."""

    def __init__(self, *nodes: NodeProcess) -> None:
        self.finished = dict.fromkeys((node.name for node in nodes), 0)
        self.faults: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(node,)) for node in nodes]

    def __enter__(self) -> Streams:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for_more(self) -> None:
        """Until each node has finished a stream that began after now."""
        wanted = {name: count + 2 for name, count in self.finished.items()}
        wait_for(lambda: all(self.finished[n] >= c for n, c in wanted.items()) or bool(self.faults), "streams end", 30)

    def _run(self, node: NodeProcess) -> None:
        while not self._stop.is_set():
            connection = http.client.HTTPConnection(node.http, timeout=60)
            try:
                connection.request("POST", "/v1/chat/completions", STREAM, JSON)
                response = connection.getresponse()
                body = response.read()
                if response.status != 200 or not body.endswith(b"data: [DONE]\n\n"):
                    self.faults.append(f"{node.name}: {response.status} {body[-300:]!r}")
            except (OSError, http.client.HTTPException) as exc:
                self.faults.append(f"{node.name}: {exc!r}")
            finally:
                connection.close()
            self.finished[node.name] += 1


def test_the_key_is_rotated_while_streams_run_on_every_node(mesh: Mesh, new_key_file: Path, tmp_path: Path) -> None:
    entry = mesh.add("--no-model")  # so that its streams cross links
    second, third = mesh.add(), mesh.add("--no-model")
    mesh.wait_until_agreed()
    with Streams(*mesh.nodes) as streams:
        streams.wait_for_more()
        assert "is not installed there" in run(entry, "keyring", "use", NEW_ID).stderr
        succeed(entry, "keyring", "install", str(new_key_file))
        assert "still seals with" in run(entry, "keyring", "remove", OLD_ID).stderr
        streams.wait_for_more()
        used = succeed(second, "keyring", "use", NEW_ID)
        assert used.count(f"seals with {NEW_ID}, accepts {OLD_ID} too") == 3
        streams.wait_for_more()
        removed = succeed(third, "keyring", "remove", OLD_ID)
        removed_at = time.monotonic()
        assert removed.count(f"seals with {NEW_ID}\n") == 3
        for command in (["install", str(new_key_file)], ["use", NEW_ID], ["remove", OLD_ID]):
            succeed(second, "keyring", *command)  # each can be repeated
        # A link that still had something under the removed key would be cut off by then.
        wait_for(lambda: time.monotonic() - removed_at > REKEY_GRACE_S + 0.5, "", 10)
        streams.wait_for_more()
    assert streams.faults == []
    assert OLD_ID not in succeed(entry, "keyring", "list")
    mesh.wait_until_agreed(5)
    for node in mesh.nodes:
        assert node.metric("ai_cluster_link_broken_total") == 0
        assert (node.folder / "data" / "keyring").stat().st_mode & 0o777 == stat.S_IRUSR | stat.S_IWUSR

    host, port = entry.mesh.split(":")
    before = entry.metric("ai_cluster_gossip_rejected_total", reason="unknown key")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.sendto(DatagramSealer(Keyring([DEVELOPMENT_KEY]), b"b" * 16).seal(b"payload"), (host, int(port)))
    wait_for(
        lambda: entry.metric("ai_cluster_gossip_rejected_total", reason="unknown key") > before,
        "the removed key is refused",
        5,
    )
    assert_refused(serve(tmp_path, "--no-model", "--join", entry.mesh), "unknown key")


def test_a_restarted_node_keeps_its_ring_and_one_that_was_away_is_brought_back(mesh: Mesh, new_key_file: Path) -> None:
    first, away = mesh.add("--no-model"), mesh.add("--no-model")
    mesh.wait_until_agreed()
    assert away.stop() == 0
    for command in (["install", str(new_key_file)], ["use", NEW_ID], ["remove", OLD_ID]):
        assert "node-2 has left and was not asked" in succeed(first, "keyring", *command)
    first.kill()
    first.start()  # without a key configured: its file decides

    away.start()  # without a seed: with one that refuses it, it would end and say why
    assert "its mesh has another cluster key" in run(away, "join", first.mesh).stderr
    for command in (["keyring", "install", str(new_key_file)], ["keyring", "use", NEW_ID], ["join", first.mesh]):
        succeed(away, *command)
    mesh.wait_until_agreed(10)
    assert OLD_ID in succeed(first, "keyring", "list")
    succeed(away, "keyring", "remove", OLD_ID)
    assert OLD_ID not in succeed(first, "keyring", "list")


def test_members_join_leave_and_forget_from_the_command_line(mesh: Mesh) -> None:
    first, second = mesh.add("--no-model"), mesh.add("--no-model")
    mesh.wait_until_agreed()
    assert "stop it first" in run(first, "forget", "node-2").stderr
    second.kill()
    lone = NodeProcess(mesh.folder, "lone", "--no-model")
    mesh.nodes.append(lone)
    lone.start()
    assert "lone" not in succeed(first, "members")
    assert "joined node-1" in succeed(lone, "join", first.mesh)
    wait_for(lambda: first.statuses().get("lone") == "healthy", "the node that joined is there", 5)
    table = succeed(first, "members", "--of", "lone")
    assert "what lone believes" in table
    assert [name in table for name in ("node-1", "node-2", "lone*")] == [True] * 3

    wait_for(lambda: first.status()["nodes"]["offline"] == 1, "the killed node is dead", 15)
    assert "node-2 is forgotten" in succeed(lone, "forget", "node-2")
    assert first.status()["nodes"] == lone.status()["nodes"] == {"healthy": 2, "degraded": 0, "offline": 0}
    succeed(first, "forget", "node-2")  # it can be repeated
    assert succeed(first, "members", "--everyone").count("itself") == 2
    told = [json.loads(line) for line in succeed(first, "members", "--everyone", "--json").splitlines()]
    assert {line["node"]: len(line["members"]) for line in told[:-1]} == {"node-1": 3, "lone": 3}
    assert told[-1]["summary"] == {"ok": 2, "failed": 0, "skipped": 0}

    assert "lone  ok  has left" in succeed(first, "leave", "lone")
    assert (lone.wait(), lone.stderr()) == (0, "")
    assert "finishes its streams" in succeed(first, "leave")
    assert (first.wait(), first.stderr()) == (0, "")


def test_admin_takes_the_nodes_own_token_and_no_other(mesh: Mesh, tmp_path: Path) -> None:
    first = mesh.add("--no-model")
    second = mesh.add("--no-model", environment={"AI_CLUSTER_ADMIN_TOKEN": "a token of sixteen and more"})
    file = first.folder / "data" / "admin-token"
    token = file.read_text().strip()
    assert file.stat().st_mode & 0o777 == 0o600
    assert [admin(first, "/admin/members", t) for t in (token, None, "", token + "x")] == [200, 401, 401, 401]
    assert admin(first, "/admin/leave", None, {}) == 401
    assert admin(first, "/admin/no-such-path", None) == 401
    assert admin(first, "/admin/no-such-path", token) == 404
    assert first.is_ready()
    assert [admin(second, "/admin/keyring", t) for t in ("a token of sixteen and more", token)] == [200, 401]
    assert not (second.folder / "data" / "admin-token").exists()

    assert "admin token" in run(second, "members").stderr
    result = run(first, "members", data_dir=tmp_path)
    assert result.exit_code == 2
    assert "--data-dir" in result.stderr
    assert run(first, "members", data_dir=mesh.folder).exit_code == 2
    first.kill()
    first.start()
    assert file.read_text().strip() == token
