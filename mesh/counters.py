"""How much of each API key the other nodes use: each counts for itself (own_counters.py) and tells all.

A node publishes, per key, totals that only rise within its generation (one life of the process), the gauges of what
runs now, and how much of the totals is of the last minute. The totals of one (node, generation, key) merge by maximum,
so reports may be lost, doubled or reordered; whatever comes through brings all that was lost before it.

A receiver counts a report's rise at its own clock's time of arrival. Rises it could not see arrive (it was away, or had
forgotten the row) are limited to what the owner says is of the last minute, so neither a first sight nor the end of a
partition counts old usage as new, and forgetting a row that is idle costs nothing. A window never counts less than what
was reported of the last WINDOW_S seconds, and holds it for at most the time in transit and its bucket_s longer.

Bounds: GENERATIONS_MAX generations of a row are merged exactly, whatever order they come in; what older ones counted is
folded into a sum that late reports no longer change. Of a node KEYS_PER_NODE_MAX rows are kept, the longest unchanged
forgotten first; beyond ROWS_MAX over all, rows of the node that is silent for longest.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from mesh.counters_wire import NO_TOTALS, Report, Totals, Usage, decode_usage

WINDOW_S = 60.0  # limits are per minute
BUCKET_S = 1.0  # of a window of one key on one node: held this much too long at most, 1.7 % of it
FINE_BUCKET_S = 0.25  # of those that limits are judged by: what a node counts itself, and all others together
GENERATIONS_MAX = 4  # more restarts than a node makes while one of its reports is on its way
KEYS_PER_NODE_MAX = 2_048  # more than a node can report within WINDOW_S, a section of some 20 rows each second
ROWS_MAX = 32_768  # of all nodes: some 30 MB
GAUGE_AGE_MAX_S = 60.0  # what runs on a node that says nothing of it for so long is taken to have ended


@dataclass(frozen=True, slots=True)
class Used:
    """requests, tokens: within the last minute. running, reserved_tokens: now."""

    requests: int = 0
    tokens: int = 0
    running: int = 0
    reserved_tokens: int = 0


class Window:
    """What was used in the last WINDOW_S seconds; at most one entry per bucket_s."""

    __slots__ = ("_bucket_s", "_buckets", "requests", "tokens")

    def __init__(self, bucket_s: float = BUCKET_S) -> None:
        self._bucket_s = bucket_s
        self._buckets: list[tuple[int, int, int]] = []  # the earliest first
        self.requests = 0
        self.tokens = 0

    def add(self, requests: int, tokens: int, now: float) -> None:
        self.expire(now)
        bucket = int(now // self._bucket_s)
        self.requests += requests
        self.tokens += tokens
        if self._buckets and self._buckets[-1][0] >= bucket:
            bucket, earlier_requests, earlier_tokens = self._buckets.pop()
            requests, tokens = requests + earlier_requests, tokens + earlier_tokens
        self._buckets.append((bucket, requests, tokens))

    def expire(self, now: float) -> None:
        """Let go what no second of the last WINDOW_S can hold; `requests` and `tokens` are right after it."""
        over = 0
        for bucket, requests, tokens in self._buckets:
            if (bucket + 1) * self._bucket_s + WINDOW_S > now:
                break
            over += 1
            self.requests -= requests
            self.tokens -= tokens
        if over:
            del self._buckets[:over]

    @property
    def last_expiry(self) -> float | None:
        """When all will have been let go; None where nothing is held."""
        return (self._buckets[-1][0] + 1) * self._bucket_s + WINDOW_S if self._buckets else None

    def expiries(self) -> Iterator[tuple[float, int, int]]:
        """(when, requests, tokens) that will be let go, the earliest first."""
        return (
            ((bucket + 1) * self._bucket_s + WINDOW_S, requests, tokens) for bucket, requests, tokens in self._buckets
        )


@dataclass(frozen=True, slots=True)
class Counted:
    """What is known of one (node, generation, key). running, reserved_tokens: as of the publication `sequence`."""

    totals: Totals = NO_TOTALS
    sequence: int = 0
    running: int = 0
    reserved_tokens: int = 0


def merge(a: Counted, b: Counted) -> Counted:
    """Commutative, associative, idempotent: the greatest totals, and the gauges last published."""
    gauges = max((a.sequence, a.running, a.reserved_tokens), (b.sequence, b.running, b.reserved_tokens))
    return Counted(a.totals.maximum(b.totals), *gauges)


class _Row:
    """One key on one node."""

    __slots__ = ("folded", "generations", "heard_at", "newest", "window")

    def __init__(self, now: float) -> None:
        self.generations: dict[int, Counted] = {}
        self.newest = 0
        self.folded = NO_TOTALS
        self.window = Window()
        self.heard_at = now

    @property
    def totals(self) -> Totals:
        total = self.folded
        for counted in self.generations.values():
            total = total.plus(counted.totals)
        return total

    def receive(self, generation: int, sequence: int, report: Report, now: float) -> tuple[int, int]:
        """(requests, tokens) that count as used now."""
        before = self.generations.get(generation)
        if before is None:
            if len(self.generations) == GENERATIONS_MAX:
                oldest = min(self.generations)
                if generation < oldest:
                    return (0, 0)
                self.folded = self.folded.plus(self.generations.pop(oldest).totals)
            before = Counted()
        after = merge(before, Counted(report.totals, sequence, report.running, report.reserved_tokens))
        self.generations[generation] = after
        self.newest = max(self.newest, generation)
        requests = min(after.totals.requests - before.totals.requests, report.recent_requests)
        tokens = min(after.totals.tokens - before.totals.tokens, report.recent_tokens)
        if requests or tokens:
            self.window.add(requests, tokens, now)
        if after.sequence > before.sequence:
            self.heard_at = now
        return (requests, tokens)


class _Node:
    __slots__ = ("gone", "latest", "rows")

    def __init__(self) -> None:
        self.rows: OrderedDict[str, _Row] = OrderedDict()  # the longest unchanged first
        self.latest = (0, 0)  # (generation, sequence)
        self.gone = (0, 0)  # gauges published up to there no longer count


class _Key:
    """All nodes' use of one key. busy: the nodes that said last that something runs."""

    __slots__ = ("busy", "rows", "window")

    def __init__(self) -> None:
        self.rows: dict[str, _Row] = {}
        self.busy: dict[str, _Row] = {}
        self.window = Window(FINE_BUCKET_S)


class PeerCounters:
    """What the other nodes reported, and how much of it is of the last minute on this node's clock."""

    def __init__(self, rows_max: int = ROWS_MAX) -> None:
        self._rows_max = rows_max
        self._nodes: OrderedDict[str, _Node] = OrderedDict()  # the longest silent first
        self._keys: dict[str, _Key] = {}
        self._row_count = 0

    def receive(self, node_id: str, section: bytes, now: float) -> None:
        """A section that node_id published, whoever brings it. Empty bytes say nothing.

        Raises MalformedDatagram; nothing has changed then."""
        if section:
            self.merge(node_id, decode_usage(section), now)

    def merge(self, node_id: str, usage: Usage, now: float) -> None:
        if not usage.reports:
            return
        node = self._nodes.setdefault(node_id, _Node())
        self._nodes.move_to_end(node_id)
        node.latest = max(node.latest, (usage.generation, usage.sequence))
        for report in usage.reports:
            key = self._keys.setdefault(report.key, _Key())
            row = node.rows.get(report.key)
            if row is None:
                row = node.rows[report.key] = key.rows[node_id] = _Row(now)
                self._row_count += 1
            node.rows.move_to_end(report.key)
            requests, tokens = row.receive(usage.generation, usage.sequence, report, now)
            if requests or tokens:
                key.window.add(requests, tokens, now)
            newest = row.generations[row.newest]
            if newest.running or newest.reserved_tokens:
                key.busy[node_id] = row
            else:
                key.busy.pop(node_id, None)
            if len(node.rows) > KEYS_PER_NODE_MAX:
                self._forget_oldest_row(node_id, node)
        while self._row_count > self._rows_max:
            silent_id, silent = next(iter(self._nodes.items()))
            self._forget_oldest_row(silent_id, silent)
            if not silent.rows:
                del self._nodes[silent_id]

    def gone(self, node_id: str) -> None:
        """A node that left or died: nothing runs there. What it used stays used."""
        if node := self._nodes.get(node_id):
            node.gone = node.latest

    def used_by(self, node_id: str, key: str, now: float) -> Used:
        of_key = self._keys.get(key)
        row = of_key.rows.get(node_id) if of_key else None
        if row is None:
            return Used()
        row.window.expire(now)
        return Used(row.window.requests, row.window.tokens, *self._gauges(node_id, row, now))

    def used(self, key: str, now: float) -> Used:
        """By all other nodes together."""
        of_key = self._keys.get(key)
        if of_key is None:
            return Used()
        running = reserved_tokens = 0
        for node_id, row in of_key.busy.items():
            runs, reserves = self._gauges(node_id, row, now)
            running += runs
            reserved_tokens += reserves
        of_key.window.expire(now)
        return Used(of_key.window.requests, of_key.window.tokens, running, reserved_tokens)

    def expiries(self, key: str) -> Iterator[tuple[float, int, int]]:
        """Of what all other nodes used; see Window."""
        of_key = self._keys.get(key)
        return of_key.window.expiries() if of_key else iter(())

    def last_expiry(self, key: str) -> float | None:
        """Of what all other nodes used; see Window."""
        of_key = self._keys.get(key)
        return of_key.window.last_expiry if of_key else None

    def totals(self, node_id: str, key: str) -> Totals:
        """Over all generations of that node. Never falls while the row is kept."""
        of_key = self._keys.get(key)
        row = of_key.rows.get(node_id) if of_key else None
        return NO_TOTALS if row is None else row.totals

    def counted(self) -> dict[tuple[str, int, str], Counted]:
        """By (node, generation, key), without what is folded: equal wherever the same reports came in."""
        return {
            (node_id, generation, key): counted
            for node_id, node in self._nodes.items()
            for key, row in node.rows.items()
            for generation, counted in row.generations.items()
        }

    @property
    def row_count(self) -> int:
        return self._row_count

    def _forget_oldest_row(self, node_id: str, node: _Node) -> None:
        key, _ = node.rows.popitem(last=False)
        of_key = self._keys[key]
        del of_key.rows[node_id]
        of_key.busy.pop(node_id, None)
        if not of_key.rows:
            del self._keys[key]
        self._row_count -= 1

    def _gauges(self, node_id: str, row: _Row, now: float) -> tuple[int, int]:
        """(running, reserved tokens) now."""
        node = self._nodes[node_id]
        counted = row.generations[row.newest]
        # A node that started anew runs nothing of its former life, whichever keys it has told of since.
        is_current = row.newest == node.latest[0] and (row.newest, counted.sequence) > node.gone
        if not is_current or now - row.heard_at > GAUGE_AGE_MAX_S:
            return (0, 0)
        return (counted.running, counted.reserved_tokens)
