"""Our own description of the API held against what a node answers: schemathesis makes requests up from /openapi.json, by
its rules and against them, and checks that no answer is a 5xx, a status, a content type or a shape that is not described,
and that what breaks a rule is refused.

On a mesh of its own, because operators' routes change it. Three ways, each bounded in time: users' routes with a key,
operators' routes with the admin token, and everything without either.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.conformance import environments
from tests.conformance.stage import MODEL, Stage

NAME = "api_description"
PASS_TIMEOUT_S = 150.0
EXAMPLES_MAX = 20  # of each operation, beside those of schemathesis' own list of corners
REQUEST_TIMEOUT_S = 30
OPTIONS = ("--no-shrink", "--continue-on-failure", "--no-color", "--workers=2", "--phases=examples,coverage,fuzzing")
# A joining node asks whatever address it is told, and a node that leaves or drains answers nothing more.
NOT_ALLOWED = "^/admin/(join|leave|drain)$"


@dataclass(frozen=True, slots=True)
class Pass:
    """seconds: after which nothing new is made up."""

    name: str
    seconds: int
    options: tuple[str, ...]


def check_api_description(folder: Path) -> bool:
    """Whether every answer was as described. Raises InstallFailed."""
    program = environments.python_environment(NAME).parent / "schemathesis"
    home = program.parents[1] / "run"
    home.mkdir(exist_ok=True)
    for file in ("schemathesis.toml", "hooks.py"):
        shutil.copy(environments.HERE / NAME / file, home / file)
    stage = Stage(folder)
    try:
        stage.start()
        key, admin_token = stage.create_key_by_cli(NAME), stage.admin_token()
        passes = (
            Pass("with a key", 60, ("-H", f"Authorization: Bearer {key}", "--exclude-path-regex", "^/admin")),
            Pass(
                "with the admin token",
                40,
                (
                    *("-H", f"Authorization: Bearer {admin_token}", "--include-path-regex", "^/admin"),
                    *("--exclude-path-regex", NOT_ALLOWED),
                ),
            ),
            Pass("with neither", 20, ("--include-path-regex", "^/(v1|admin)", "--exclude-checks=ignored_auth")),
        )
        return all([run(program, home, stage.entry.url, one) for one in passes])
    finally:
        stage.close()


def run(program: Path, home: Path, url: str, one: Pass) -> bool:
    print(f"\n== {NAME}, {one.name}", flush=True)
    command = [str(program), "run", f"{url}/openapi.json", f"--max-examples={EXAMPLES_MAX}", f"--max-time={one.seconds}"]
    command += [f"--request-timeout={REQUEST_TIMEOUT_S}", *OPTIONS, *one.options]
    environment = os.environ | {"AI_CLUSTER_MODEL": MODEL, "NO_PROXY": "127.0.0.1"}
    try:
        done = subprocess.run(
            command, cwd=home, env=environment, timeout=PASS_TIMEOUT_S, check=False, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        print(f"{NAME} did not end within {PASS_TIMEOUT_S:g} s")
        return False
    print(shortened(done.stdout + done.stderr))
    return done.returncode == 0


def shortened(text: str, line_chars: int = 500) -> str:
    """A request of 10 MB is no help on a terminal."""
    return "\n".join(line[:line_chars] for line in text.splitlines())
