"""Whether a key's request may begin, over all nodes, without any centre. docs/limits.md derives what this keeps to.

Each node counts what it lets in (mesh.own_counters), tells it by gossip, and counts what the others tell
(mesh.counters), in sliding windows of a minute. What it cannot know yet is what the others have let in since they told
last; so of what is left of a limit it takes at most its share for what it has not told yet, or one request. Were all
nodes to use up their shares at the same moment, they would have used the limit; only the single requests come on top:
less than one a node.

A node that was lost without leaving may be on the other side of a partition, where it is counted on. From its first
suspicion on, for hold_s, or until it is forgotten, it keeps its share: who is left has the limit times live nodes by
all nodes. What the lost ones had told counts against their own share first.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mesh.counters import PeerCounters, Used
from mesh.own_counters import OwnCounters
from mesh.view import ClusterView, MemberStatus

HOLD_S = 600.0
RETRY_AFTER_MIN_S = 0.05
# Where requests run that end at no known time.
RETRY_RUNNING_S = 1.0
# Until the others have heard what this node has let in: some intervals of gossip.
RETRY_BRIEF_S = 0.5

Kind = Literal["requests", "tokens", "concurrency"]


@dataclass(frozen=True, slots=True)
class Limits:
    """None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None


@dataclass(frozen=True, slots=True)
class Shares:
    """live: nodes that answer, this one included. lost: ids of those whose share is held, suspects among them."""

    live: int = 1
    lost: tuple[str, ...] = ()

    def of(self, limit: int) -> int:
        """What the live ones may use of it."""
        return max(1, limit * self.live // (self.live + len(self.lost)))


@dataclass(frozen=True, slots=True)
class Refusal:
    """retry_after_s: None where waiting does not help, because the request alone exceeds the limit. is_brief: it may
    hold no longer than until the next word of the others, well below a second."""

    kind: Kind
    limit: int
    retry_after_s: float | None
    is_brief: bool = False


@dataclass(frozen=True, slots=True)
class Remaining:
    """Of one limit: how much is left, and after how many seconds all of it would be."""

    limit: int
    remaining: int
    reset_s: float


@dataclass(frozen=True, slots=True)
class _Use:
    """used: of the window or now, by all nodes; lost: by those that are lost; unheard: by this one, not told yet."""

    used: int
    lost: int
    unheard: int


class LostNodes:
    """Which nodes do not answer though they never left, and since when those that are dead. Bounded by the members that
    gossip remembers."""

    def __init__(self, hold_s: float = HOLD_S) -> None:
        self._hold_s = hold_s
        self._since: dict[str, float] = {}
        self._seen: ClusterView | None = None
        self._shares = Shares()
        self._until = math.inf

    def shares(self, view: ClusterView, now: float) -> Shares:
        if view is self._seen and now < self._until:
            return self._shares
        live, lost, suspects = 0, {}, []
        for member in view.members.values():
            if member.status is MemberStatus.DEAD:
                lost[member.node_id] = self._since.get(member.node_id, now)
            elif member.status is MemberStatus.SUSPECT:
                suspects.append(member.node_id)  # a cut lets each side use the whole limit until it is noticed
            elif member.status is not MemberStatus.LEFT:
                live += 1
        self._since = lost
        dead = [node_id for node_id, since in lost.items() if now - since < self._hold_s]
        self._shares = Shares(max(1, live), tuple(sorted(dead + suspects)))
        self._until = min((lost[node_id] + self._hold_s for node_id in dead), default=math.inf)
        self._seen = view
        return self._shares


class Limiter:
    """Decides for this node."""

    def __init__(self, own: OwnCounters, peers: PeerCounters, shares: Callable[[float], Shares]) -> None:
        """shares: as of a time, instant."""
        self._own = own
        self._peers = peers
        self._shares = shares

    def check(self, key: str, limits: Limits, tokens: int, now: float) -> Refusal | None:
        """Whether a request that may use so many tokens may begin now. The caller then counts it, before it awaits
        anything: OwnCounters.begin()."""
        shares = self._shares(now)
        own, used, lost = self._used(key, shares, now)
        unheard = self._own.unheard(key, now)
        demands: tuple[tuple[Kind, int | None, int, _Use], ...] = (
            ("requests", limits.requests_per_minute, 1, _Use(used.requests, lost.requests, unheard.requests)),
            (
                "tokens",
                limits.tokens_per_minute,
                tokens,
                _Use(used.tokens + used.reserved_tokens, lost.tokens + lost.reserved_tokens, unheard.reserved_tokens),
            ),
            (
                "concurrency",
                limits.concurrency,
                1,
                _Use(used.running, lost.running, min(unheard.requests, own.running)),
            ),
        )
        for kind, limit, cost, use in demands:
            if limit is None:
                continue
            if cost > limit:
                return Refusal(kind, limit, None)
            if not _has_room(limit, cost, use, shares):
                # What others run may have ended since they told: who asks one node after the other waits for no limit.
                may_be_over = kind == "concurrency" and own.running + cost <= limit
                retry_after_s = self._retry_after_s(key, kind, limit, cost, use, shares, now)
                return Refusal(kind, limit, retry_after_s, is_brief=may_be_over)
            if not _is_in_share(limit, cost, use, shares):
                return Refusal(kind, limit, RETRY_BRIEF_S, is_brief=True)
        return None

    def uses(self, key: str, limits: Limits, now: float) -> dict[Kind, tuple[int, int]]:
        """(limit, how much of it is used over all nodes), of the limits that the key has."""
        _, used, _ = self._used(key, self._shares(now), now)
        rows: tuple[tuple[Kind, int | None, int], ...] = (
            ("requests", limits.requests_per_minute, used.requests),
            ("tokens", limits.tokens_per_minute, used.tokens + used.reserved_tokens),
            ("concurrency", limits.concurrency, used.running),
        )
        return {kind: (limit, amount) for kind, limit, amount in rows if limit is not None}

    def remaining(self, key: str, limits: Limits, now: float) -> dict[Kind, Remaining]:
        """Of the limits per minute that the key has, for the x-ratelimit headers."""
        shares = self._shares(now)
        _, used, _ = self._used(key, shares, now)
        rows: tuple[tuple[Kind, int | None, int], ...] = (
            ("requests", limits.requests_per_minute, used.requests),
            ("tokens", limits.tokens_per_minute, used.tokens + used.reserved_tokens),
        )
        last = max(now, self._own.last_expiry(key) or now, self._peers.last_expiry(key) or now)
        return {
            kind: Remaining(limit, max(0, shares.of(limit) - amount), last - now)
            for kind, limit, amount in rows
            if limit is not None
        }

    def _used(self, key: str, shares: Shares, now: float) -> tuple[Used, Used, Used]:
        """(by this node, by all, by those that are lost)."""
        own, others = self._own.used(key, now), self._peers.used(key, now)
        lost = Used()
        for node_id in shares.lost:
            lost = _sum(lost, self._peers.used_by(node_id, key, now))
        return own, _sum(own, others), lost

    def _retry_after_s(
        self, key: str, kind: Kind, limit: int, cost: int, use: _Use, shares: Shares, now: float
    ) -> float:
        """Until so much has left the window that the request fits, if nothing else comes in."""
        if kind == "concurrency":
            return RETRY_RUNNING_S
        excess = max(1, use.used + cost - shares.of(limit))
        for when, requests, tokens in heapq.merge(self._own.expiries(key), self._peers.expiries(key)):
            excess -= requests if kind == "requests" else tokens
            if excess <= 0:
                return max(RETRY_AFTER_MIN_S, when - now)
        return RETRY_RUNNING_S  # what is reserved leaves the window a minute after it was used, or is given back


def _has_room(limit: int, cost: int, use: _Use, shares: Shares) -> bool:
    """By all that is known: in the limit, and for the live nodes in theirs. A request that alone exceeds what the live
    ones may use is let in where they use nothing."""
    live = max(0, use.used - use.lost)
    return use.used + cost <= limit and (live + cost <= shares.of(limit) or live == 0)


def _is_in_share(limit: int, cost: int, use: _Use, shares: Shares) -> bool:
    """Of what was left before this node took what it has not told yet."""
    left = shares.of(limit) - max(0, use.used - use.lost) + use.unheard
    return use.unheard == 0 or (use.unheard + cost) * shares.live <= left


def _sum(a: Used, b: Used) -> Used:
    return Used(
        a.requests + b.requests, a.tokens + b.tokens, a.running + b.running, a.reserved_tokens + b.reserved_tokens
    )
