"""An environment of its own for the onnxruntime-genai builder, made once and kept.

The builder needs torch and transformers, which no serving node does, and its package brings a CPU onnxruntime that
would overwrite the files of onnxruntime-gpu.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from nodes.model_tools.errors import ModelToolError
from nodes.model_tools.locking import held

# Known to build Llama, Qwen2, Qwen3, Mistral, Phi3 and Gemma together.
PACKAGES = (
    "onnxruntime-genai==0.18.0",
    "onnxruntime==1.32.0",
    "torch==2.13.0",
    "transformers==5.23.0",
    "onnx==1.23.2",
    "onnx-ir==1.1.0",
)
PIP_INSTALL = ("-m", "pip", "install", "--disable-pip-version-check", "--no-input")
READY_FILE = "ai-cluster-builder.txt"  # in an environment that is complete: the packages it has
OUTPUT_LINES_SHOWN = 60

Say = Callable[[str], None]


class CommandFailed(ModelToolError):
    """A command of the environment ended with an error. output: its last lines."""

    def __init__(self, message: str, output: str) -> None:
        super().__init__(message)
        self.output = output


def default_environment() -> Path:
    """In the user's cache folder; other package versions get another."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    versions = hashlib.sha256("\n".join(PACKAGES).encode()).hexdigest()[:12]
    return cache / "ai-cluster" / f"builder-{versions}"


def prepare_environment(folder: Path, *, python: Path | None = None, say: Say = lambda line: None) -> Path:
    """Its Python interpreter; makes the environment if it is not complete. python: makes it; None is this one.

    Raises ModelToolError, CommandFailed when something cannot be installed."""
    interpreter = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    wanted = "\n".join(PACKAGES) + "\n"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with held(folder.parent / f"{folder.name}.lock", f"another build is making {folder}; wait for it"):
            ready = folder / READY_FILE
            if ready.is_file() and ready.read_text() == wanted and interpreter.exists():
                return interpreter
            if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").is_file():
                raise ModelToolError(f"{folder} holds something else; give an empty folder with --env")
            say(f"making the builder's environment in {folder}: several GB and minutes, once")
            making = "the builder's environment cannot be made; give another folder with --env"
            run_command([str(python or sys.executable), "-m", "venv", "--clear", str(folder)], making)
            installing = "the builder's packages cannot be installed; check the network, pip's index and the disk"
            run_command([str(interpreter), *PIP_INSTALL, *PACKAGES], installing)
            ready.write_text(wanted)
    except OSError as exc:
        raise ModelToolError(f"{exc.filename or folder}: {exc.strerror}; give a writable folder with --env") from exc
    return interpreter


def run_command(command: Sequence[str], complaint: str, environment: dict[str, str] | None = None) -> None:
    """Run to the end without a shell and without input. environment: added to this process's.

    Raises CommandFailed, whose message is the complaint, and OSError when there is no such program."""
    finished = subprocess.run(  # noqa: S603 (the command is ours; paths are arguments of their own)
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **(environment or {})},
        check=False,
    )
    if finished.returncode != 0:
        lines = finished.stdout.decode("utf-8", "replace").splitlines()[-OUTPUT_LINES_SHOWN:]
        raise CommandFailed(f"{complaint} (exit status {finished.returncode})", "\n".join(lines))
