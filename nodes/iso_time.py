"""How people are shown a time: ISO 8601, UTC, to the second."""

from __future__ import annotations

from datetime import UTC, datetime


def iso_time(seconds: float) -> str:
    """seconds: since 1970, up to the year 9999. `2027-01-31T12:00:00Z`."""
    return datetime.fromtimestamp(int(seconds), UTC).isoformat().replace("+00:00", "Z")
