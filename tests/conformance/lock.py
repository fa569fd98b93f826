"""`make conformance-lock`: every lock below tests/conformance made anew from the versions named beside it.

Locks hold versions and hashes, and no address: a registry is the machine's matter, not the project's."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conformance.environments import HERE, node_runtime, with_node

PYTHON_VERSION = "3.11"
UV = "uv==0.13.9"
COMPILE = ("pip", "compile", "--quiet", "--universal", "--generate-hashes", "--no-emit-index-url")
COMPILE_FORM = ("--no-emit-find-links", "--no-header", "--no-annotate", "--python-version", PYTHON_VERSION)
NPM_LOCK = ("install", "--package-lock-only", "--omit-lockfile-registry-resolved", "--ignore-scripts", "--no-audit")
ADDRESSES = ("resolved", "funding")


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        binaries = Path(folder) / "bin"
        subprocess.run([str(binaries / "python"), "-m", "pip", "install", "--quiet", UV], check=True)
        for wanted in sorted(HERE.glob("*/requirements.in")):
            lock = wanted.with_suffix(".lock")
            command = [str(binaries / "uv"), *COMPILE, *COMPILE_FORM, wanted.name, "-o", lock.name]
            subprocess.run(command, cwd=wanted.parent, check=True)
    node = node_runtime()
    for package in sorted(HERE.glob("*/package.json")):
        subprocess.run([str(node / "npm"), *NPM_LOCK], cwd=package.parent, env=with_node(node), check=True)
        lock = package.with_name("package-lock.json")
        document = json.loads(lock.read_text())
        for entry in document["packages"].values():
            for name in ADDRESSES:
                entry.pop(name, None)
        lock.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
