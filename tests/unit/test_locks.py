"""requirements-run.lock is the part of requirements.lock that running needs, and all of it."""

from __future__ import annotations

import tomllib
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def pins(file_name: str) -> dict[str, str]:
    """By name: version, condition and hashes of each package of a lock."""
    found: dict[str, str] = {}
    name = ""
    for line in (ROOT / file_name).read_text().splitlines():
        if not line.startswith(" "):
            name = line.partition("==")[0]
            found[name] = ""
        found[name] += line
    return found


def version_and_hashes(pin: str) -> tuple[str, set[str]]:
    """Without the condition: what only tests need may need a package where running does not."""
    words = pin.replace("\\", " ").split()
    return words[0], {word for word in words if word.startswith("--hash=")}


def test_what_runs_is_pinned_as_what_is_tested() -> None:
    whole, run = pins("requirements.lock"), pins("requirements-run.lock")
    assert {name: version_and_hashes(pin) for name, pin in run.items()} == {
        name: version_and_hashes(whole[name]) for name in run
    }
    assert not {"pytest", "mypy", "ruff", "playwright"} & set(run)


def test_all_that_running_needs_is_pinned() -> None:
    run = pins("requirements-run.lock")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting = [Requirement(text) for text in project["dependencies"]]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        needed = waiting.pop()
        name, extras = canonicalize_name(needed.name), frozenset(needed.extras)
        here = [{"extra": extra} for extra in (*extras, "")]
        if (name, extras) in seen or (needed.marker is not None and not needed.marker.evaluate({"extra": ""})):
            continue
        seen.add((name, extras))
        assert name in run, f"{name} is missing; make lock"
        for text in requires(name) or ():
            inner = Requirement(text)
            if inner.marker is None or any(inner.marker.evaluate(environment) for environment in here):
                inner.marker = None
                waiting.append(inner)
    assert len(seen) > 20
