"""The environment of each client, made on demand below .conformance/: a virtual environment from a lock of pinned and
hashed packages, or the packages of an npm lock. Nothing here falls back to what the machine happens to have.

Node itself is a wheel of a pinned version, so that a machine needs Python alone, and the clients that need a recent
Node get it whatever the distribution ships.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1] / ".conformance"
NODE_RUNTIME = "node_runtime"
INSTALL_TIMEOUT_S = 600.0
STAMP = ".installed"
PIP = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes", "-r")
NPM_CI = ("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error")


class InstallFailed(Exception):
    """A client's environment could not be made."""


def python_environment(name: str) -> Path:
    """The interpreter of the environment for tests/conformance/<name>, made where its lock has changed.

    Raises InstallFailed."""
    lock = HERE / name / "requirements.lock"
    folder = ROOT / name
    python = folder / "bin" / "python"
    inputs = _digest(lock, sys.version)
    if not _is_installed(folder, inputs):
        shutil.rmtree(folder, ignore_errors=True)
        _run(name, [sys.executable, "-m", "venv", str(folder)])
        _run(name, [str(python), *PIP, str(lock)])
        (folder / STAMP).write_text(inputs)
    return python


def node_runtime() -> Path:
    """The folder with node and npm. Raises InstallFailed."""
    return python_environment(NODE_RUNTIME).parent


def npm_environment(name: str) -> Path:
    """The folder with the packages of tests/conformance/<name>, into which its tests are copied: modules are looked up
    beside the file that imports them. Raises InstallFailed."""
    source, folder = HERE / name, ROOT / name
    binaries = node_runtime()
    inputs = _digest(source / "package-lock.json", str(binaries))
    if not _is_installed(folder, inputs):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file in ("package.json", "package-lock.json"):
            shutil.copy(source / file, folder / file)
        _run(name, [str(binaries / NPM_CI[0]), *NPM_CI[1:]], cwd=folder, env=with_node(binaries))
        (folder / STAMP).write_text(inputs)
    for module in (*source.glob("*.mjs"), *HERE.glob("*.mjs")):
        shutil.copy(module, folder / module.name)
    return folder


def with_node(binaries: Path) -> dict[str, str]:
    """This process's environment with that node first."""
    return os.environ | {"PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}


def _is_installed(folder: Path, inputs: str) -> bool:
    stamp = folder / STAMP
    return stamp.exists() and stamp.read_text() == inputs


def _digest(lock: Path, *others: str) -> str:
    return hashlib.sha256("\n".join((lock.read_text(), *others)).encode()).hexdigest()


def _run(name: str, command: list[str], cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False
    )
    if done.returncode:
        shown = (done.stdout + done.stderr)[-2000:]
        raise InstallFailed(f"the environment of {name} could not be made: {' '.join(command)}\n{shown}")
