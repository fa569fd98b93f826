"""A contestant is a process that answers commands: one JSON line in, one out. Nothing here needs a package.

Contestants are processes of their own because each brings its own runtime and threads; all of them are loaded while
rounds are interleaved, and only one is asked at a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Handler = Callable[..., dict[str, Any]]
REPOSITORY = Path(__file__).parents[3]


class WorkerFailed(Exception):
    """The process ended or answered with an error."""


class Worker:
    """Starts the process; it loads its model when it is first asked."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        # Nobody's runtime sends events while another one is measured.
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "ORT_DISABLE_TELEMETRY": "1"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=environment,
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Raises WorkerFailed."""
        self.tell(do, **arguments)
        return self.answer()

    def tell(self, do: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerFailed(f"{self.name} ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if error := answer.get("error"):
            raise WorkerFailed(f"{self.name}: {error}")
        return answer

    def close(self) -> None:
        """The process ends when its input does."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()


def claim_stdout() -> Callable[[dict[str, Any]], None]:
    """A function that writes one answer. Whatever else prints goes to stderr from now on, C++ code included."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(answer: dict[str, Any]) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    return reply


def serve(handlers: Mapping[str, Handler]) -> None:
    """Answer commands until the input ends."""
    reply = claim_stdout()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            reply(handlers[command.pop("do")](**command))
        except Exception as exc:  # the controller reports it, whatever it is
            reply({"error": f"{type(exc).__name__}: {exc}"})
