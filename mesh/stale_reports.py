"""What other entries have done since the reports that this one reads. Sees no clock.

They choose on the same grounds as this one, so the node that looked best in the last reports is not the best any more:
so many requests as came since are supposed to have gone to the nodes that looked best, and to have filled them up to
one level, as water does. A request that each entry sends to a node with the probability of its part in that water
leaves them level (Dahlin, "Interpreting Stale Load Information", 2000).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

RATE_WINDOW_S = 2.0  # in which an entry's rate of dispatches is seen to change: some reports, and a burst


class DispatchRate:
    """Of this entry, per second, with older dispatches counting exponentially less."""

    __slots__ = ("_at", "_per_s")

    def __init__(self) -> None:
        self._per_s = 0.0
        self._at = 0.0

    def note(self, now: float) -> None:
        self._per_s = self.per_s(now) + 1 / RATE_WINDOW_S
        self._at = now

    def per_s(self, now: float) -> float:
        return self._per_s * math.exp(-max(0.0, now - self._at) / RATE_WINDOW_S)


def water_level(estimates_s: Sequence[float], added_s: Sequence[float], arrivals: float) -> float:
    """Up to which estimate `arrivals` requests fill the nodes. estimates_s: rising, not empty. added_s: by how much one
    request raises each, positive."""
    level_s, taken, per_s = estimates_s[0], 0.0, 0.0
    for estimate_s, cost_s in zip(estimates_s, added_s, strict=True):
        more = (estimate_s - level_s) * per_s
        if taken + more >= arrivals and per_s:
            break
        taken += more
        level_s = estimate_s
        per_s += 1 / cost_s
    return level_s + (arrivals - taken) / per_s
