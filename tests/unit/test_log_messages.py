"""Messages of log lines are constant: values are fields, so that lines can be counted and searched by what happened."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}
FILES = sorted(path for package in ("mesh", "nodes", "observability") for path in (ROOT / package).rglob("*.py"))


def varying(source: str) -> Iterator[int]:
    """Lines of calls of `logger` whose message is no constant. One given by a name is the caller's constant."""
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        if not (isinstance(call.func.value, ast.Name) and call.func.value.id == "logger"):
            continue
        if call.func.attr in LEVELS or call.func.attr == "log":
            messages = call.args[1:] if call.func.attr == "log" else call.args
            if len(messages) != 1 or not isinstance(messages[0], ast.Constant | ast.Name):
                yield call.lineno


@pytest.mark.parametrize(
    "call", ['logger.info("%s is here", name)', 'logger.info(f"{name} is here")', 'logger.log(level, "a" + name)']
)
def test_a_message_that_varies_is_found(call: str) -> None:
    assert list(varying(call)) == [1]


def test_no_message_varies() -> None:
    assert FILES
    assert {str(path): lines for path in FILES if (lines := list(varying(path.read_text())))} == {}
