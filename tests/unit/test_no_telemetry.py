"""Nothing is sent home, and nothing is kept in the user's home folder for that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nodes.model_tools.random_llama import write_random_llama


@pytest.mark.parametrize("imported", ["nodes.engine.session", "nodes.engine.embedding_session", "nodes.cli"])
def test_onnx_runtime_is_told_before_it_is_imported(imported: str) -> None:
    program = (
        "import builtins, importlib, os, sys\n"
        "told = []\n"
        "original = builtins.__import__\n"
        "def watched(name, *arguments):\n"
        "    if name == 'onnxruntime' and name not in sys.modules:\n"
        "        told.append(os.environ.get('ORT_DISABLE_TELEMETRY'))\n"
        "    return original(name, *arguments)\n"
        "builtins.__import__ = watched\n"
        f"importlib.import_module({imported!r})\n"
        "import nodes.engine.session\n"
        "assert told and set(told) == {'1'}, told\n"
    )
    subprocess.run([sys.executable, "-c", program], env=without_telemetry_setting(), check=True)


def test_loading_a_model_leaves_nothing_in_the_home_folder(tmp_path: Path) -> None:
    home, model = tmp_path / "home", write_random_llama(tmp_path / "model")
    home.mkdir()
    command = [sys.executable, "-m", "nodes", "models", "check", str(model)]
    environment = without_telemetry_setting() | {"HOME": str(home)}
    checked = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert "telemetry" not in checked.stdout + checked.stderr
    assert [file for file in home.rglob("*") if "microsoft" in str(file.relative_to(home)).lower()] == []


def without_telemetry_setting() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
