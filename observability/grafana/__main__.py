"""Writes dashboards/*.json beside this file; a test compares them with what this would write."""

from __future__ import annotations

from pathlib import Path

from observability.grafana.dashboards import DASHBOARDS
from observability.grafana.form import as_text

FOLDER = Path(__file__).parent / "dashboards"


def files() -> dict[str, str]:
    """file name → content."""
    return {f"{dashboard.uid}.json": as_text(dashboard) for dashboard in DASHBOARDS}


if __name__ == "__main__":
    for name, text in files().items():
        (FOLDER / name).write_text(text)
