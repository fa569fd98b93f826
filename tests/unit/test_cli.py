import inspect
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mesh.seal import parse_key
from nodes import cli
from nodes.config import SECRET_KEYS, NodeConfig

runner = CliRunner()

# Keys that are no flag: secrets that would show in process lists, and what only a parent process sets.
NOT_FLAGS = SECRET_KEYS | {"stop_with_stdin", "gossip"}


def test_every_configuration_key_is_a_flag_of_serve_and_every_flag_a_key() -> None:
    flags = {name.removesuffix("_") for name in inspect.signature(cli.serve).parameters} - {"config"}
    assert flags == set(NodeConfig.model_fields) - NOT_FLAGS


@pytest.mark.parametrize(
    "command",
    [
        *([], ["serve"], ["up"], ["status"], ["top"], ["chat"], ["models"], ["keyring", "new"], ["config", "check"]),
        *(["keyring", "list"], ["keyring", "install"], ["keyring", "use"], ["keyring", "remove"], ["keyring"]),
        *(["members"], ["join"], ["leave"], ["forget"]),
        *(["models", "list"], ["models", "check"], ["models", "pull"], ["models", "build"], ["models", "random"]),
    ],
)
def test_help_is_there_for_every_command(command: list[str]) -> None:
    result = runner.invoke(cli.app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_a_new_key_is_one_that_a_node_takes() -> None:
    keys = {runner.invoke(cli.app, ["keyring", "new"]).stdout.strip() for _ in range(2)}
    assert len(keys) == 2
    assert {len(parse_key(key)) for key in keys} == {32}


def test_config_check_prints_what_a_node_would_use_and_never_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = runner.invoke(cli.app, ["keyring", "new"]).stdout.strip()
    monkeypatch.setenv("AI_CLUSTER_KEY", key)
    file = tmp_path / "node.toml"
    file.write_text("slots = 3\n")
    result = runner.invoke(cli.app, ["config", "check", str(file)])
    assert result.exit_code == 0
    assert "slots = 3" in result.stdout
    assert key not in result.stdout


def test_config_check_names_a_fault(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text("slots = -3\n")
    result = runner.invoke(cli.app, ["config", "check", str(file)])
    assert result.exit_code == 2
    assert "slots = -3" in result.stderr


@pytest.mark.parametrize("command", [["status"], ["top"], ["models", "list"], ["chat", "hello"]])
def test_a_node_that_is_not_there_is_one_line_with_the_fix(command: list[str]) -> None:
    result = runner.invoke(cli.app, [*command, "--url", "http://127.0.0.1:1"])
    assert result.exit_code == 1
    assert "no node answers at http://127.0.0.1:1" in result.stderr
    assert "ai-cluster up" in result.stderr


def test_an_empty_question_is_a_usage_error() -> None:
    result = runner.invoke(cli.app, ["chat"], input="\n")
    assert result.exit_code == 2
    assert "no question" in result.stderr


@pytest.mark.parametrize(("arguments", "text"), [([], b"caf\xe9\n"), (["caf\udce9"], None)], ids=["stdin", "argument"])
def test_a_question_that_is_no_text_is_a_usage_error(arguments: list[str], text: bytes | None) -> None:
    result = runner.invoke(cli.app, ["chat", *arguments], input=text)
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert "no UTF-8 text" in result.stderr


def test_the_version_is_that_of_the_package() -> None:
    result = runner.invoke(cli.app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"ai-cluster {version('ai-cluster')}\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", [["keyring", "new"], ["config", "check"]], ids=" ".join)
def test_output_that_cannot_be_written_is_one_line(command: list[str], unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        ended = _run(command, unbuffered, full.fileno())
    assert (ended.returncode, ended.stderr) == (
        1,
        b"ai-cluster: the output cannot be written: No space left on device\n",
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_gone_is_no_line(unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = _run(["config", "check"], unbuffered, writer)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, b"")


def _run(command: list[str], unbuffered: str, output: int) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    arguments = [sys.executable, "-m", "nodes", *command]
    return subprocess.run(arguments, stdout=output, stderr=subprocess.PIPE, env=environment, timeout=60)
