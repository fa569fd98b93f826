"""How people are shown a time, and write one: ISO 8601, shown in UTC, to the second."""

from __future__ import annotations

from datetime import UTC, datetime

DAY_S = 86_400


def iso_time(seconds: float) -> str:
    """seconds: since 1970, up to the year 9999. `2027-01-31T12:00:00Z`."""
    return datetime.fromtimestamp(int(seconds), UTC).isoformat().replace("+00:00", "Z")


def parse_time(text: str) -> int:
    """Seconds since 1970 of a date, or of a time of ISO 8601; UTC where it names no zone. Raises ValueError."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError("a date such as 2027-01-31, or a time such as 2027-01-31T12:00+01:00") from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def parse_day(text: str) -> int:
    """Days since 1970. Raises ValueError."""
    try:
        return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) // DAY_S
    except (ValueError, OverflowError):
        raise ValueError("a day such as 2026-11-27") from None
