"""Our own description of the API held against what a node answers. schemathesis makes requests up from /openapi.json,
by its rules and against them, and checks that no answer is a 5xx, a status, a content type or a shape that is not
described, and that what breaks a rule is refused.

On a mesh of its own, because operators' routes change it. Each pass is bounded in time and in examples.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.conformance import environments
from tests.conformance.stage import MODEL, Stage

NAME = "api_description"
PASS_TIMEOUT_S = 120.0
EXAMPLES_MAX = 20  # of each operation, beside those of schemathesis' own list of corners
REQUEST_TIMEOUT_S = 30
ANSWERS_MIN = 20
LINE_CHARS = 400  # a request of 10 MB is no help on a terminal
# One worker: with two, what makes requests up trips over itself now and then.
OPTIONS = ("--no-shrink", "--continue-on-failure", "--no-color", "--workers=1")
GENERATING = ("/v1/chat/completions", "/v1/completions")
# A joining node asks whatever address it is told, and a node that leaves or drains answers nothing more.
NOT_ALLOWED = "^/admin/(join|leave|drain)$"


@dataclass(frozen=True, slots=True)
class Pass:
    """seconds: after which nothing new is made up. answered: operations that are to be answered with a 200 ANSWERS_MIN
    times at least; else the pass has shown nothing."""

    name: str
    seconds: int
    options: Sequence[str]
    answered: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)


def passes(key: str, admin_token: str) -> list[Pass]:
    with_key = ("-H", f"Authorization: Bearer {key}")
    with_token = ("-H", f"Authorization: Bearer {admin_token}")
    every_way = "--phases=examples,coverage,fuzzing"
    return [
        Pass(
            "requests that are to be answered",
            30,
            (*with_key, "--mode=positive", "--phases=fuzzing", *(f"--include-path={path}" for path in GENERATING)),
            tuple(f"POST {path}" for path in GENERATING),
            {"AI_CLUSTER_WELL_FORMED": "1"},
        ),
        Pass("anything, with a key", 45, (*with_key, every_way, "--exclude-path-regex", "^/admin")),
        Pass(
            "anything, with the admin token",
            40,
            (*with_token, every_way, "--include-path-regex", "^/admin", "--exclude-path-regex", NOT_ALLOWED),
        ),
        Pass("anything, with neither", 15, (every_way, "--include-path-regex", "^/(v1|admin)")),
    ]


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
        every = passes(stage.create_key_by_cli(NAME), stage.admin_token())
        return not [one.name for one in every if not run(program, home, stage.entry.url, one)]
    finally:
        stage.close()


def run(program: Path, home: Path, url: str, one: Pass) -> bool:
    print(f"\n== {NAME}: {one.name}", flush=True)
    status_file = home / "statuses.json"
    status_file.unlink(missing_ok=True)
    command = [str(program), "run", f"{url}/openapi.json", f"--max-examples={EXAMPLES_MAX}"]
    command += [f"--max-time={one.seconds}", f"--request-timeout={REQUEST_TIMEOUT_S}", *OPTIONS, *one.options]
    told = {"AI_CLUSTER_MODEL": MODEL, "AI_CLUSTER_STATUS_FILE": str(status_file), "NO_PROXY": "127.0.0.1"}
    try:
        done = subprocess.run(
            command,
            cwd=home,
            env=os.environ | told | one.environment,
            timeout=PASS_TIMEOUT_S,
            check=False,
            capture_output=True,
            text=True,
        )
    except subprocess.TimeoutExpired:
        print(f"it did not end within {PASS_TIMEOUT_S:g} s")
        return False
    statuses = json.loads(status_file.read_text()) if status_file.exists() else {}
    for operation, counts in sorted(statuses.items()):
        print(f"  {operation}: " + ", ".join(f"{count} x {status}" for status, count in sorted(counts.items())))
    is_well = done.returncode == 0
    if not is_well:
        print("\n".join(line[:LINE_CHARS] for line in (done.stdout + done.stderr).splitlines()))
    for operation in one.answered:
        answers = statuses.get(operation, {}).get("200", 0)
        if answers < ANSWERS_MIN:
            print(f"{operation} was answered {answers} times, {ANSWERS_MIN} at least would show something")
            is_well = False
    return is_well
