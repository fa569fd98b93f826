"""Huge pages: what is asked for, what stays as it was, and systems that have none."""

from __future__ import annotations

import mmap
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodes.engine import huge_pages
from nodes.engine.huge_pages import HUGE_PAGE_BYTES, collapse_new, private_regions

SIZE = 8 * HUGE_PAGE_BYTES

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux alone")


@pytest.fixture
def memory() -> Iterator[mmap.mmap]:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS if sys.platform == "linux" else 0
    with mmap.mmap(-1, SIZE, flags=flags) as memory:
        yield memory


def huge_kib() -> int:
    """Of this process, as the kernel counts them."""
    text = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8")
    found = re.search(r"AnonHugePages:\s+(\d+)", text)
    return int(found[1]) if found else 0


@linux_only
def test_memory_allocated_since_then_is_on_huge_pages_with_its_contents_unchanged() -> None:
    before, huge_before = private_regions(), huge_kib()
    memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    contents = bytes(range(256)) * (SIZE // 256)
    memory[:] = contents
    collapsed = collapse_new(before)
    if not collapsed:
        pytest.skip("this kernel knows no MADV_COLLAPSE, or refuses it")
    assert huge_kib() - huge_before >= (SIZE - 2 * HUGE_PAGE_BYTES) // 1024
    assert memory[:] == contents
    memory.close()


@linux_only
def test_memory_that_was_there_before_is_left_alone(memory: mmap.mmap) -> None:
    memory[:] = b"x" * SIZE
    before, huge_before = private_regions(), huge_kib()
    collapse_new(before)
    assert huge_kib() - huge_before < SIZE // 1024 // 2


@linux_only
def test_a_deadline_in_the_past_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "SECONDS_MAX", -1.0)
    assert collapse_new({}) == 0


def test_other_systems_have_no_regions_and_collapse_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages.sys, "platform", "darwin")
    assert private_regions() == {}
    assert collapse_new({}) == 0
