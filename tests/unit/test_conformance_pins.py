"""Which clients are tested: versions are exact, told on their page, and locks name no registry."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFORMANCE = ROOT / "tests" / "conformance"
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
WANTED = sorted(CONFORMANCE.glob("*/requirements.in"))
PACKAGES = sorted(CONFORMANCE.glob("*/package.json"))
LOCKS = sorted([*CONFORMANCE.glob("*/requirements.lock"), *CONFORMANCE.glob("*/package-lock.json")])
RUNNERS = {"pytest"}
EXACT = re.compile(r"\d+(\.\d+)+")
ADDRESS = re.compile(r"://|--(extra-)?index-url|--find-links|\bresolved\b")


def pins(file: Path) -> dict[str, str]:
    if file.name == "package.json":
        found: dict[str, str] = json.loads(file.read_text())["dependencies"]
        return found
    return dict(line.split("==") for line in file.read_text().split())


@pytest.mark.parametrize("file", [*WANTED, *PACKAGES], ids=lambda file: file.parent.name)
def test_versions_are_exact_and_on_the_page(file: Path) -> None:
    for name, version in pins(file).items():
        assert EXACT.fullmatch(version)
        assert name in RUNNERS or f"`{name}` {version}" in PAGE


@pytest.mark.parametrize("file", LOCKS, ids=lambda file: file.parent.name)
def test_a_lock_names_no_address_and_holds_what_is_wanted(file: Path) -> None:
    text = file.read_text()
    assert not ADDRESS.search(text)
    if file.name == "package-lock.json":
        entries = json.loads(text)["packages"]
        assert entries.pop("")["dependencies"] == pins(file.with_name("package.json"))
        assert all(entry["integrity"].startswith("sha512-") for entry in entries.values())
    else:
        packages = re.findall(r"^[a-z0-9-]+(?:\[[a-z,-]+\])?==", text, re.MULTILINE)
        assert len(packages) == len(re.findall(r"^[a-z0-9].*\\\n +--hash=sha256:", text, re.MULTILINE))
        for name, version in pins(file.with_suffix(".in")).items():
            assert f"{name}=={version} " in text


def test_every_suite_has_a_lock() -> None:
    assert {lock.parent.name for lock in LOCKS} == {file.parent.name for file in (*WANTED, *PACKAGES)}
    assert len(LOCKS) == len(WANTED) + len(PACKAGES) >= 8
