"""The operators' commands against a scripted node: the token they find, what they print, how they end."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from nodes import cli
from nodes.admin_client import find_token
from nodes.config import ConfigInvalid
from nodes.node_address import parse_url
from nodes.operator_tables import MATRIX_OBSERVERS_MAX, disputed_members, matrix_table

TOKEN = "a token of a node"
KEY_TEXT = base64.b64encode(b"n" * 32).decode()
SUMMARY = {"summary": {"ok": 1, "failed": 0, "skipped": 0}, "done": True, "message": "all done"}
FAILED = {"summary": {"ok": 1, "failed": 1, "skipped": 1}, "done": False, "message": "1 of 2 nodes failed"}


class ScriptedNode:
    """Answers every request with the same lines."""

    def __init__(self) -> None:
        self.lines: list[dict[str, object]] = []
        self.status = 200
        self.requests: list[tuple[str, str, Any]] = []
        self.tokens: list[str | None] = []
        self.url = ""

    @contextmanager
    def serving(self) -> Iterator[ScriptedNode]:
        node = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.do_POST()

            def do_PATCH(self) -> None:
                self.do_POST()

            def do_DELETE(self) -> None:
                self.do_POST()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                node.requests.append((self.command, self.path, json.loads(body) if body else None))
                node.tokens.append(self.headers.get("authorization"))
                self.send_response(node.status)
                self.end_headers()
                self.wfile.write("".join(json.dumps(line) + "\n" for line in node.lines).encode())

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            self.url = f"http://127.0.0.1:{server.server_port}"
            yield self
            server.shutdown()
            thread.join()


@pytest.fixture
def node() -> Iterator[ScriptedNode]:
    with ScriptedNode().serving() as scripted:
        yield scripted


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("AI_CLUSTER_ADMIN_TOKEN", raising=False)
    (tmp_path / "admin-token").write_text(TOKEN + "\n")
    return tmp_path


def run(node: ScriptedNode, data_dir: Path, *command: str, text: str | None = None) -> Result:
    return CliRunner().invoke(cli.app, [*command, "--url", node.url, "--data-dir", str(data_dir)], input=text)


def belief(name: str, membership: str = "alive", *, is_self: bool = False) -> dict[str, object]:
    return {
        "node_id": name, "is_self": is_self, "membership": membership, "status": "healthy", "readiness": "ready",
        "age_s": 0.52, "mesh": "10.0.0.1:7946", "http": "", "version": "0.1", "generation": 3, "state_version": 99,
        "models": ["demo"],
    }  # fmt: skip


def test_a_warning_goes_to_stderr_and_the_command_is_done(node: ScriptedNode, data_dir: Path) -> None:
    node.lines = [{"node": "b", "warning": "is the last"}, {"node": "b", "ok": True, "state": "none runs"}, SUMMARY]
    result = run(node, data_dir, "drain", "b")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "b  ok  none runs\nall done\n", "b  is the last\n")


def test_each_node_is_a_line_and_failures_go_to_stderr_with_exit_code_1(node: ScriptedNode, data_dir: Path) -> None:
    node.lines = [
        {"node": "a", "ok": True, "primary": "aaaaaaaa", "keys": ["aaaaaaaa", "bbbbbbbb"]},
        {"node": "b", "ok": False, "error": "the disk is full"},
        {"node": "c", "skipped": "is dead and was not asked"},
        FAILED,
    ]
    result = run(node, data_dir, "keyring", "use", "AAAAAAAA")
    assert result.exit_code == 1
    assert result.stdout == "a  ok  seals with aaaaaaaa, accepts bbbbbbbb too\n"
    assert result.stderr.splitlines() == [
        "b  failed: the disk is full", "c  is dead and was not asked", "ai-cluster: 1 of 2 nodes failed",
    ]  # fmt: skip
    assert node.requests == [("POST", "/admin/keyring/use", {"key_id": "aaaaaaaa", "force": False, "here": False})]
    assert node.tokens == [f"Bearer {TOKEN}"]


@pytest.mark.parametrize(
    ("command", "request_sent"),
    [
        (["join", "10.0.0.9:1"], ("POST", "/admin/join", {"address": "10.0.0.9:1"})),
        (["drain"], ("POST", "/admin/drain", {"node_id": None, "undo": False})),
        (["drain", "--undo", "b"], ("POST", "/admin/drain", {"node_id": "b", "undo": True})),
        (["leave"], ("POST", "/admin/leave", {"node_id": None})),
        (["leave", "b"], ("POST", "/admin/leave", {"node_id": "b"})),
        (["forget", "b"], ("POST", "/admin/forget", {"node_id": "b"})),
        (
            ["keyring", "remove", "aaaaaaaa", "--force", "--here"],
            ("POST", "/admin/keyring/remove", {"key_id": "aaaaaaaa", "force": True, "here": True}),
        ),
        (["members", "--of", "b:1"], ("GET", "/admin/members?of=b%3A1", None)),
        (["members", "--everyone"], ("GET", "/admin/members?of=%2A", None)),
        (["keyring", "list"], ("GET", "/admin/keyring", None)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_each_command_asks_for_what_it_says(
    command: list[str], request_sent: object, node: ScriptedNode, data_dir: Path
) -> None:
    node.lines = [SUMMARY]
    result = run(node, data_dir, *command)
    assert result.exit_code == 0, result.output
    assert node.requests == [request_sent]


def test_a_key_comes_from_a_file_or_from_standard_input_and_is_never_printed(
    node: ScriptedNode, data_dir: Path
) -> None:
    node.lines = [SUMMARY]
    (data_dir / "new.key").write_text(KEY_TEXT + "\n")
    for result in (
        run(node, data_dir, "keyring", "install", str(data_dir / "new.key")),
        run(node, data_dir, "keyring", "install", "-", text=KEY_TEXT),
    ):
        assert (result.exit_code, result.stdout) == (0, "all done\n")
    assert [body["key"].strip() for _, _, body in node.requests] == [KEY_TEXT] * 2


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["keyring", "install", "absent.key"], "absent.key: No such file"),
        (["keyring", "install", "-"], "standard input: a cluster key"),
        (["keyring", "use", "12"], "'12' is no key id; ai-cluster keyring list"),
        (["keyring", "remove", "no key"], "no key id"),
        (["members", "--of", "b", "--everyone"], "contradict"),
        (["join", "foo"], "'foo' is no HOST:PORT, such as 127.0.0.1:7946; give the mesh address of a node"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_usage_error_asks_nothing(command: list[str], words: str, node: ScriptedNode, data_dir: Path) -> None:
    result = run(node, data_dir, *command, text="no key")
    assert result.exit_code == 2
    assert words in result.stderr
    assert node.requests == []


def test_an_answer_that_breaks_off_is_a_failure_that_can_be_repeated(node: ScriptedNode, data_dir: Path) -> None:
    node.lines = [{"node": "a", "ok": True}]
    result = run(node, data_dir, "leave", "a")
    assert result.exit_code == 1
    assert "before it was complete; the command can be repeated" in result.stderr


@pytest.mark.parametrize(("status", "exit_code"), [(401, 2), (409, 1), (503, 1)])
@pytest.mark.parametrize("command", [["members"], ["keys", "list"]], ids=" ".join)
def test_a_refusal_is_shown_as_the_node_words_it_and_a_wrong_token_is_a_fault_here(
    command: list[str], status: int, exit_code: int, node: ScriptedNode, data_dir: Path
) -> None:
    node.status, node.lines = status, [{"error": {"message": "/admin takes this node's admin token"}}]
    result = run(node, data_dir, *command)
    assert result.exit_code == exit_code
    assert result.stderr == "ai-cluster: /admin takes this node's admin token\n"


def test_members_are_a_table_and_as_json_the_lines_themselves(node: ScriptedNode, data_dir: Path) -> None:
    node.lines = [{"node": "a", "ok": True, "members": [belief("a", is_self=True), belief("b", "suspect")]}, SUMMARY]
    table = run(node, data_dir, "members").stdout
    assert [word in table for word in ("a*", "suspect", "0.5 s ago", "10.0.0.1:7946", "3.99", "demo")] == [True] * 6
    printed = run(node, data_dir, "members", "--json").stdout
    assert [json.loads(line) for line in printed.splitlines()] == node.lines


def test_what_nodes_disagree_on_is_marked(node: ScriptedNode, data_dir: Path) -> None:
    node.lines = [
        {"node": "a", "ok": True, "members": [belief("a", is_self=True), belief("b", "dead"), belief("c")]},
        {"node": "b", "ok": True, "members": [belief("a"), belief("b", is_self=True)]},
        SUMMARY,
    ]
    output = run(node, data_dir, "members", "--everyone").stdout
    assert "! b" in output
    assert "! c" in output
    assert "! a" not in output
    assert "unknown" in output
    assert "disagree on b, c" in output


def test_a_matrix_of_many_observers_counts_instead() -> None:
    names = [f"n{i:02}" for i in range(MATRIX_OBSERVERS_MAX + 1)]
    answers = [{"node": name, "members": [belief(other) for other in names]} for name in names]
    answers[4]["members"][7] = belief("n07", "dead")  # type: ignore[index]
    table = matrix_table(answers)
    assert len(table.columns) == 2
    assert list(table.columns[1].cells)[7] == f"alive: {MATRIX_OBSERVERS_MAX} nodes; dead: n04"
    assert disputed_members(answers) == ["n07"]


def test_keys_are_told_by_where_they_are(node: ScriptedNode, data_dir: Path) -> None:
    node.lines = [
        {"node": "a", "ok": True, "primary": "bbbbbbbb", "keys": ["bbbbbbbb", "aaaaaaaa"]},
        {"node": "b", "ok": True, "primary": "aaaaaaaa", "keys": ["aaaaaaaa"]},
        SUMMARY,
    ]
    rows = [line.split() for line in run(node, data_dir, "keyring", "list").stdout.splitlines()[2:]]
    assert rows == [["aaaaaaaa", "all", "2", "b"], ["bbbbbbbb", "a", "a"]]


def test_the_token_is_that_of_the_node_at_the_url(tmp_path: Path) -> None:
    for name, port in (("node-1", 8080), ("node-2", 8081)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "admin-token").write_text(f"of {name}\n")
        (tmp_path / name / "node.json").write_text(json.dumps({"http": f"127.0.0.1:{port}"}))
    assert find_token(parse_url("http://127.0.0.1:8081"), tmp_path, {}) == "of node-2"
    assert find_token(parse_url("http://localhost:8080/"), tmp_path, {}) == "of node-1"
    (tmp_path / "admin-token").write_text("of the folder\n")
    assert find_token(parse_url("http://127.0.0.1:9"), tmp_path, {}) == "of the folder"
    assert (
        find_token(parse_url("http://127.0.0.1:8081"), tmp_path, {"AI_CLUSTER_ADMIN_TOKEN": "of the variable"})
        == "of the variable"
    )


def test_a_token_that_is_not_there_is_named_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "node-1").mkdir()
    (tmp_path / "node-1" / "node.json").write_text("[]")
    for url, folder in (("http://a:8080", tmp_path), ("http://a", tmp_path / "absent")):
        with pytest.raises(ConfigInvalid, match=r"--data-dir.*AI_CLUSTER_ADMIN_TOKEN"):
            find_token(parse_url(url), folder, {})


@pytest.mark.parametrize(
    "command", [["members"], ["join"], ["drain"], ["leave"], ["forget"], ["keyring", "use"]], ids=" ".join
)
def test_help_says_where_the_token_is_and_what_exit_codes_mean(command: list[str]) -> None:
    words = " ".join(CliRunner().invoke(cli.app, [*command, "--help"]).output.split())
    assert "AI_CLUSTER_ADMIN_TOKEN" in words
    assert "Exit code 0" in words
    assert command not in (["members"], ["drain"], ["leave"]) or "default: the one" in words
