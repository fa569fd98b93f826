"""OpenAI's x-ratelimit headers: what is left of a key's limits, over all nodes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from nodes.access.limits import Kind, Remaining


def limit_headers(remaining: Mapping[Kind, Remaining]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for kind, left in remaining.items():
        headers[f"x-ratelimit-limit-{kind}"] = str(left.limit)
        headers[f"x-ratelimit-remaining-{kind}"] = str(left.remaining)
        headers[f"x-ratelimit-reset-{kind}"] = _duration(left.reset_s)
    return headers


def _duration(seconds: float) -> str:
    """As OpenAI writes it: 120ms, 8.5s, 1m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}m{rest:.0f}s" if minutes else f"{round(rest, 2):g}s"
