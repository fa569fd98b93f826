"""How many streams may be opened elsewhere on a mere guess. Sans-IO.

Nodes that share an overloaded machine would else fail over into each other until all collapse.
"""

from __future__ import annotations

from collections import deque

# Of the streams that run here, in a window of time.
BUDGET_SHARE = 0.1
BUDGET_MIN = 4
BUDGET_WINDOW_S = 10.0


class FailoverBudget:
    """Spent by every failover and second opening that no broken link and no word of the node itself called for."""

    def __init__(self) -> None:
        self._spent: deque[float] = deque()  # when; at most one window's budget

    def take(self, running: int, now: float) -> bool:
        """True where one more may be. running: streams open here."""
        while self._spent and self._spent[0] <= now - BUDGET_WINDOW_S:
            self._spent.popleft()
        if len(self._spent) >= max(BUDGET_MIN, int(running * BUDGET_SHARE)):
            return False
        self._spent.append(now)
        return True
