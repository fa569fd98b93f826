"""What this node has sent to others that their reports may not contain yet. Sees no clock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

# A report that arrives this soon after a dispatch may have been written before the dispatch reached its node.
REPORT_DELAY_S = 0.1
# Own dispatches remembered per node and model; at more per report interval every node is full anyway.
OWN_DISPATCHES_MAX = 4096


class OwnDispatch:
    """A request this node has sent. It counts towards its node until a report contains it, or it ends."""

    __slots__ = ("_ledger", "at", "is_counted", "is_open", "tokens")

    def __init__(self, ledger: Ledger, tokens: int, at: float) -> None:
        self._ledger = ledger
        self.tokens = tokens
        self.at = at
        self.is_counted = True
        self.is_open = True

    def count_no_more(self) -> None:
        """The node's report contains it. Any number of times."""
        if self.is_counted:
            self.is_counted = False
            self._ledger.count -= 1
            self._ledger.tokens -= self.tokens

    def finish(self) -> None:
        """It has ended, or never began. Any number of times."""
        self.count_no_more()
        if self.is_open:
            self.is_open = False
            self._ledger.open -= 1


@dataclass(slots=True)
class Ledger:
    """The own dispatches to one node and model, oldest first, and their sums.

    count, tokens: of those that no report contains, their number and prompt tokens to prefill. open: of all that run.
    """

    entries: deque[OwnDispatch] = field(default_factory=deque)
    count: int = 0
    tokens: int = 0
    open: int = 0

    def add(self, tokens: int, at: float) -> OwnDispatch:
        if len(self.entries) >= OWN_DISPATCHES_MAX:
            self.entries.popleft().count_no_more()
        entry = OwnDispatch(self, tokens, at)
        self.entries.append(entry)
        self.count += 1
        self.tokens += tokens
        self.open += 1
        return entry

    def prune(self, reported_at: float) -> None:
        """Forget what has ended, and what a report that arrived at `reported_at` contains."""
        while self.entries:
            entry = self.entries[0]
            if entry.is_counted and reported_at - entry.at < REPORT_DELAY_S:
                return
            self.entries.popleft().count_no_more()
