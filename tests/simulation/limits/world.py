"""Nodes with the production limiter and counters, on a virtual clock. What gossip does to usage sections is modelled:
each node publishes as often as mesh.pace allows, each publication reaches each other node late or not at all."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from mesh.counters import WINDOW_S, PeerCounters
from mesh.own_counters import OwnCounters
from mesh.pace import USAGE_INTERVAL_A_MEMBER_S
from nodes.access.limits import Limiter, Limits, Shares

KEY = "k"
DETECTION_S = 2.0  # until a node that is out of reach is suspect: a probe's interval and its verdict
PUBLISH_INTERVAL_S = 1.0


@dataclass(slots=True)
class SimNode:
    name: str
    own: OwnCounters = field(default_factory=lambda: OwnCounters(1))
    peers: PeerCounters = field(default_factory=PeerCounters)
    published_at: float = 0.0
    publish_at: float = 0.0
    unseen: dict[str, float] = field(default_factory=dict)  # peers out of reach, since when
    limiter: Limiter = field(init=False)


@dataclass(frozen=True, slots=True)
class Admitted:
    at: float
    node: str
    tokens: int


class World:
    """delay_s: a publication takes up to that long; loss: the part of them that arrives nowhere."""

    def __init__(self, count: int, limits: Limits, *, seed: int = 0, delay_s: float = 0.05, loss: float = 0.0) -> None:
        self.now = 0.0
        self.limits = limits
        self.admitted: list[Admitted] = []
        self.refused = 0
        self.nodes = [SimNode(f"node-{i}") for i in range(count)]
        for node in self.nodes:
            node.limiter = Limiter(node.own, node.peers, lambda now, node=node: self._shares(node))  # type: ignore[misc]
            node.publish_at = random.Random(f"{seed}{node.name}").random()
        self._rng = random.Random(seed)
        self._delay_s, self._loss = delay_s, loss
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._side: dict[str, int] = {}

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), what))

    def run(self, until: float) -> None:
        while True:
            due = min(self.nodes, key=lambda node: node.publish_at)
            event_at = self._events[0][0] if self._events else float("inf")
            when = min(due.publish_at, event_at)
            if when > until:
                self.now = until
                return
            self.now = max(self.now, when)
            if event_at <= due.publish_at:
                heapq.heappop(self._events)[2]()
            else:
                self._publish(due)

    def ask(self, node: SimNode, tokens: int = 0, running_s: float = 0.0, used: int | None = None) -> bool:
        """A request that reserves `tokens`, runs so long and uses `used` of them (None: all)."""
        if node.limiter.check(KEY, self.limits, tokens, self.now) is not None:
            self.refused += 1
            return False
        node.own.begin(KEY, tokens, self.now)
        self.admitted.append(Admitted(self.now, node.name, tokens if used is None else used))
        spacing = min(PUBLISH_INTERVAL_S, USAGE_INTERVAL_A_MEMBER_S * len(self.nodes))
        node.publish_at = min(node.publish_at, max(self.now, node.published_at + spacing))

        def end() -> None:
            node.own.count(KEY, 0, tokens if used is None else used, self.now)
            node.own.end(KEY, tokens)

        self.at(self.now + running_s, end)
        return True

    def hammer(self, rate_per_s: float, until: float, tokens: int = 0, running_s: float = 0.0) -> None:
        """Poisson arrivals at random nodes."""

        def arrive() -> None:
            self.ask(self._rng.choice(self.nodes), tokens, running_s)
            if (then := self.now + self._rng.expovariate(rate_per_s)) < until:
                self.at(then, arrive)

        self.at(self.now, arrive)

    def cut(self, *sides: list[int]) -> None:
        for number, side in enumerate(sides):
            for index in side:
                self._side[self.nodes[index].name] = number
        for node in self.nodes:
            node.unseen = {
                other.name: self.now for other in self.nodes if self._side[other.name] != self._side[node.name]
            }

    def heal(self) -> None:
        self._side = {}
        for node in self.nodes:
            node.unseen = {}

    def most_in_a_window(self, window_s: float = WINDOW_S) -> tuple[int, int]:
        """(requests, tokens) of the fullest window."""
        most_requests = most_tokens = tokens = start = 0
        for end, use in enumerate(self.admitted):
            tokens += use.tokens
            while self.admitted[start].at <= use.at - window_s:
                tokens -= self.admitted[start].tokens
                start += 1
            most_requests = max(most_requests, end + 1 - start)
            most_tokens = max(most_tokens, tokens)
        return most_requests, most_tokens

    def count(self, since: float, until: float) -> tuple[int, int]:
        within = [use for use in self.admitted if since <= use.at < until]
        return len(within), sum(use.tokens for use in within)

    def _shares(self, node: SimNode) -> Shares:
        lost = tuple(name for name, since in node.unseen.items() if self.now - since >= DETECTION_S)
        return Shares(len(self.nodes) - len(lost), lost)

    def _publish(self, node: SimNode) -> None:
        node.published_at = self.now
        node.publish_at = self.now + PUBLISH_INTERVAL_S
        section = node.own.section(self.now)
        if not section:
            return
        for other in self.nodes:
            if other is node or self._side.get(other.name) != self._side.get(node.name):
                continue
            if self._rng.random() >= self._loss:
                delay_s = self._rng.random() * self._delay_s
                self.at(
                    self.now + delay_s,
                    lambda other=other: other.peers.receive(node.name, section, self.now),  # type: ignore[misc]
                )
