"""Planted secrets, everything a node does with them, and a search of all that it shows: none may be there."""

from __future__ import annotations

import http.client
import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.seal import new_key
from tests.cluster.mesh import Mesh, NodeProcess

CHAT = "/v1/chat/completions"


class Watched:
    """Asks one node, and keeps all that it answers, heads included."""

    def __init__(self, node: NodeProcess) -> None:
        self.node = node
        self.shown = b""

    def ask(
        self, method: str, path: str, body: object = None, token: str = "", *, keep: bool = True, **headers: str
    ) -> tuple[int, bytes]:
        host, port = self.node.http.split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        fields = {"content-type": "application/json"} | {name.replace("_", "-"): v for name, v in headers.items()}
        if token:
            fields["authorization"] = f"Bearer {token}"
        connection.request(method, path, content, fields)
        answer = connection.getresponse()
        read = answer.read()
        if keep:
            self.shown += str(answer.getheaders()).encode() + read
        connection.close()
        return answer.status, read


@pytest.fixture
def planted(tmp_path: Path) -> Iterator[tuple[Mesh, str, str]]:
    """(two nodes, their cluster key, the first one's admin token)."""
    cluster_key, admin_token = new_key(), secrets.token_urlsafe(32)
    mesh = Mesh(tmp_path)
    try:
        for _ in range(2):
            environment = {"AI_CLUSTER_KEY": cluster_key, "AI_CLUSTER_ADMIN_TOKEN": admin_token}
            mesh.add("--log-level", "debug", "--log-console", "plain", environment=environment)
        mesh.wait_until_agreed()
        yield mesh, cluster_key, admin_token
    finally:
        mesh.close()


def test_no_secret_is_in_any_log_metric_error_title_or_status(planted: tuple[Mesh, str, str], tmp_path: Path) -> None:
    mesh, cluster_key, admin_token = planted
    new_cluster_key = new_key()
    one, two = (Watched(node) for node in mesh.nodes)
    status, made = one.ask("POST", "/admin/keys", {"name": "alice"}, admin_token, keep=False)
    assert status == 200, made
    api_key = json.loads(made)["token"]
    wrong_key = api_key[:-1] + ("a" if api_key[-1] != "a" else "b")
    asked = {"model": "demo", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}

    statuses = [
        one.ask("POST", CHAT, asked, api_key)[0],
        two.ask("POST", CHAT, asked | {"stream": True}, api_key)[0],
        one.ask("GET", "/v1/models", None, api_key)[0],
        # Refused, with secrets where they do not belong.
        one.ask("POST", CHAT, asked, wrong_key)[0],
        one.ask("POST", CHAT, asked, admin_token)[0],
        one.ask("POST", CHAT, asked, cluster_key)[0],
        one.ask("POST", CHAT, asked | {"temperature": api_key}, api_key)[0],
        one.ask("POST", CHAT, asked | {"messages": api_key}, api_key)[0],
        one.ask("POST", CHAT, f'{{"model": "{api_key}'.encode(), api_key)[0],
        one.ask("POST", f"{CHAT}?api_key={api_key}", asked)[0],
        one.ask("POST", CHAT, asked, api_key, content_type=api_key)[0],
        one.ask("GET", f"/{admin_token}?token={api_key}", None)[0],
        one.ask("GET", "/admin/keys", None, api_key)[0],
        one.ask("GET", "/admin/members", None, cluster_key)[0],
        one.ask("POST", "/admin/keys", {"name": "bob", "priority": api_key}, admin_token)[0],
        one.ask("POST", "/admin/keyring/install", {"key": cluster_key, "here": api_key}, admin_token)[0],
        one.ask("POST", "/admin/keyring/install", {"key": cluster_key[:-3]}, admin_token)[0],
    ]
    assert statuses[:3] == [200, 200, 200]
    assert all(400 <= status < 500 for status in statuses[3:]), statuses
    # What operators do.
    for method, path, body in (
        ("GET", "/admin/keys", None),
        ("GET", "/admin/keys/alice", None),
        ("PATCH", "/admin/keys/alice", {"concurrency": 5}),
        ("GET", "/admin/usage", None),
        ("GET", "/admin/members", None),
        ("POST", "/admin/keyring/install", {"key": new_cluster_key}),
        ("GET", "/admin/keyring", None),
        ("DELETE", "/admin/keys/alice", None),
    ):
        status, answer = one.ask(method, path, body, admin_token)
        assert status == 200, (path, answer)
    for watched in (one, two):
        for path in ("/metrics", "/cluster/status", "/health", "/health/ready", "/openapi.json", "/docs"):
            assert watched.ask("GET", path)[0] == 200
    titles = b"".join(
        Path(f"/proc/{node.pid}/{file}").read_bytes() for node in mesh.nodes for file in ("cmdline", "comm", "status")
    )
    for node in mesh.nodes:
        assert node.stop() == 0

    files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    # What a node keeps for itself, readable by nobody else; that holds secrets, and is no output.
    own = {file for file in files if file.name in ("keyring", "admin-token") and file.stat().st_mode & 0o077 == 0}
    places = {str(file): content for file, content in files.items() if file not in own}
    assert any(b"POST" in content for name, content in places.items() if name.endswith("combined.log"))
    places |= {"answers of one": one.shown, "answers of two": two.shown, "process titles": titles}
    planted_secrets = {
        "API key": api_key.rsplit("-", 1)[1],
        "admin token": admin_token,
        "cluster key": cluster_key.rstrip("="),
        "new cluster key": new_cluster_key.rstrip("="),
    }
    found = [
        (what, where)
        for what, secret in planted_secrets.items()
        for where, text in places.items()
        if secret.lower().encode() in text.lower()
    ]
    assert found == []
