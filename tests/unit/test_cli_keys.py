"""The commands for API keys against a scripted node: what they ask, what they print where."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nodes import cli
from tests.unit.test_cli_mesh import ScriptedNode, run

KEY: dict[str, object] = {"id": "bbbb", "name": "alice", "expires_at": None}
OTHER: dict[str, object] = {"id": "aaaa", "name": "alice", "expires_at": "2026-11-29T00:00:00Z"}
EDITED: dict[str, object] = {"key": KEY, "also_revoked": [], "others": [], "unserved_models": [], "untold": {}}


@pytest.fixture
def node() -> Iterator[ScriptedNode]:
    with ScriptedNode().serving() as scripted:
        yield scripted


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AI_CLUSTER_ADMIN_TOKEN", "a token of a node")
    return tmp_path


def test_a_new_key_is_alone_on_the_last_line_and_a_model_nobody_serves_is_told_on_stderr(
    node: ScriptedNode, data_dir: Path
) -> None:
    node.lines = [{**EDITED, "token": "sk-bbbb-secret", "unserved_models": ["demoo"]}]
    result = run(node, data_dir, "keys", "create", "--name", "alice", "--models", "demoo")
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "sk-bbbb-secret")
    assert "no node serves 'demoo' now" in result.stderr


def test_a_key_of_the_same_name_that_still_works_is_told_with_the_command_that_ends_it(
    node: ScriptedNode, data_dir: Path
) -> None:
    node.lines = [{**EDITED, "others": [OTHER]}]
    result = run(node, data_dir, "keys", "revoke", "sk-bbbb")
    assert result.stdout == "revoked the key sk-bbbb (alice)\n"
    assert result.stderr == (
        "sk-aaaa (alice) still works until 2026-11-29T00:00:00Z; to end it: ai-cluster keys revoke sk-aaaa\n"
    )


def test_revoke_all_names_each_key(node: ScriptedNode, data_dir: Path) -> None:
    node.lines = [{**EDITED, "also_revoked": ["aaaa"]}]
    result = run(node, data_dir, "keys", "revoke", "--all", "alice")
    assert node.requests == [("DELETE", "/admin/keys/alice?all=true", None)]
    assert result.stdout == "revoked the key sk-bbbb (alice)\nrevoked the key sk-aaaa\n"


def test_a_new_key_is_shown_also_by_a_node_of_an_older_version(node: ScriptedNode, data_dir: Path) -> None:
    node.lines = [{"key": KEY, "untold": {}, "token": "sk-bbbb-secret"}]
    result = run(node, data_dir, "keys", "create", "--name", "alice")
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "sk-bbbb-secret")


def test_a_refused_command_fails_with_the_reason_alone_on_stderr(node: ScriptedNode, data_dir: Path) -> None:
    node.status, node.lines = 404, [{"error": {"message": "the key 'typo' is not known here"}}]
    for command in (["keys", "revoke", "typo"], ["keys", "show", "typo"], ["usage", "--key", "typo"]):
        result = run(node, data_dir, *command)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr == "ai-cluster: the key 'typo' is not known here\n"


@pytest.mark.parametrize("command", ["create", "change"])
def test_help_says_what_a_limit_means_over_several_nodes(command: str) -> None:
    words = " ".join(CliRunner().invoke(cli.app, ["keys", command, "--help"]).output.split())
    assert "in any 60 seconds over all nodes together" in words
    assert "docs/limits.md" in words
