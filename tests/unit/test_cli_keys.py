"""The commands for API keys against a scripted node: what they ask, what they print where."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nodes import cli
from nodes.api.keys import GRACE_S_MAX
from nodes.cli_keys import GRACE_HOURS_MAX
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


CREATE = ("keys", "create", "--name", "n")


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ((*CREATE, "--expires", "tomorrow"), "--expires tomorrow: a date such as 2027-01-31"),
        ((*CREATE, "--expires", "2020-01-01"), "--expires 2020-01-01: this time has passed"),
        ((*CREATE, "--expires", "1960-01-01"), "--expires: a time after 1970"),
        ((*CREATE, "--models", "m" * 300), "--models: at most"),
        (("keys", "create", "--name", ""), "--name: 1 to 100 printable characters"),
        (("keys", "change", "n", "--name", "a\nb"), "--name: 1 to 100 printable characters"),
        (("keys", "change", "n", "--expires", "soon"), "--expires soon: a date such as 2027-01-31"),
        (("keys", "rotate", "n", "--grace-hours", "1e9"), "--grace-hours 1e+09: at most 2160 hours"),
        (("keys", "rotate", "n", "--grace-hours", "inf"), "--grace-hours inf: at most 2160 hours"),
        (("usage", "--from", "foo"), "--from foo: a day such as 2026-11-27"),
        (("usage", "--to", "2026-13-01"), "--to 2026-13-01: a day such as 2026-11-27"),
        (("usage", "--from", "2026-11-02", "--to", "2026-11-01"), "--from 2026-11-02 is after --to 2026-11-01"),
    ],
)
def test_what_no_node_would_take_is_told_by_its_option_and_no_node_is_asked(
    node: ScriptedNode, data_dir: Path, command: tuple[str, ...], line: str
) -> None:
    result = run(node, data_dir, *command)
    assert (result.exit_code, result.stdout, node.requests) == (2, "", [])
    assert result.stderr.startswith(f"ai-cluster: {line}")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "body"),
    [
        (("--expires", "2020-01-01"), {"expires_at": "2020-01-01"}),
        (
            ("--expires", "never", "--models", "all", "--concurrency", "0"),
            {"expires_at": None, "models": [], "concurrency": None},
        ),
        (("--disable", "--priority", "3", "--models", "a,b"), {"enabled": False, "priority": 3, "models": ["a", "b"]}),
    ],
)
def test_a_change_asks_for_what_was_given(
    node: ScriptedNode, data_dir: Path, options: tuple[str, ...], body: dict[str, object]
) -> None:
    node.lines = [EDITED]
    assert run(node, data_dir, "keys", "change", "a/b", *options).exit_code == 0
    assert node.requests == [("PATCH", "/admin/keys/a%2Fb", body)]


def test_the_longest_grace_is_that_of_a_node() -> None:
    assert GRACE_HOURS_MAX * 3600 == GRACE_S_MAX
