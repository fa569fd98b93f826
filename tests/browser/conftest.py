"""A browser for the tests of the status page: Debian's chromium, driven by playwright; and axe-core from npm.

Where one of them is missing the tests are skipped, in continuous integration (CI=true) they fail."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.mesh import Mesh

CHROMIUM = shutil.which(os.environ.get("CHROMIUM", "chromium"))
# `make browser-tools` puts it there; git ignores the folder.
AXE = Path(__file__).parents[2] / ".cache" / "npm" / "node_modules" / "axe-core" / "axe.min.js"


def missing(what: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what}; continuous integration needs it")
    pytest.skip(what)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed: make browser-tools")
    if CHROMIUM is None:
        missing("no chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        # Its own sandbox needs privileges that a container's root has not; it opens pages of this test alone.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core."""
    if not AXE.exists():
        missing(f"no {AXE.name}: make browser-tools")
    return AXE.read_text(encoding="utf-8")


@pytest.fixture
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """For a test that harms nodes."""
    yield from three_nodes(tmp_path_factory)


@pytest.fixture(scope="session")
def calm_mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """For tests that do not."""
    yield from three_nodes(tmp_path_factory)


def three_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Ready, and agreed: `entry` without a model, so that every answer comes from another node."""
    mesh = Mesh(tmp_path_factory.mktemp("mesh"))
    try:
        mesh.add("--no-model", name="entry")
        mesh.add(name="node-2")
        mesh.add(name="node-3")
        mesh.wait_until_agreed()
        yield mesh
    finally:
        mesh.close()
