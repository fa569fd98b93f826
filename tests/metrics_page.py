"""docs/metrics.md as data, for the tests that compare it with what nodes export."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
_ROW = re.compile(r"^\| `(\w+)` \| (\w+) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class PageRow:
    kind: str
    labels: frozenset[str]
    unit: str


def page_rows() -> dict[str, PageRow]:
    """By metric, under the names that queries use: counters end with _total, histograms have their base name."""
    return {
        name: PageRow(kind, frozenset(re.findall(r"`(\w+)`", labels)), unit)
        for name, kind, labels, unit, _, _ in _ROW.findall(PAGE.read_text())
    }
