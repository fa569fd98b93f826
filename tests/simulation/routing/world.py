"""Nodes, entries and time. Every entry sees the others through reports as old as gossip's; its own row is as of now."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from mesh.prefix_digests import DIGEST_INTERVAL_S, encode_digest
from mesh.state import QUEUE_JUMP
from mesh.view import (
    Address,
    ClusterView,
    MemberStatus,
    MemberView,
    ModelInfo,
    ModelLoad,
    NodeLoad,
    NodeProfile,
    Readiness,
)
from tests.simulation.routing.engine import Engine, Speed
from tests.simulation.routing.policies import Policy, Refused
from tests.simulation.routing.traces import Request, Trace, arrivals, next_turn

MODEL = "demo"
PUBLISH_INTERVAL_S = 1.0
LOAD_INTERVAL_S = 0.1  # how often a node looks whether its load has jumped
DELAY_S = (0.01, 0.06)  # from a publication to an entry
HOP_S = 0.001  # a request to a node, and a refusal back
TRIES_MAX = 4  # nodes tried for one request
ADDRESS = Address("127.0.0.1", 7946)


@dataclass(frozen=True, slots=True)
class Setting:
    """One run. load: of what the nodes can do at most with full batches and nothing cached. entries: nodes that clients
    ask; the first ones. seconds: of arrivals, the first quarter of which is not counted."""

    nodes: int = 16
    load: float = 0.8
    trace: Trace = "poisson"
    seed: int = 0
    seconds: float = 240.0
    entries: int = 8
    slots: int = 8
    queue_limit: int = 16
    speed: Speed = field(default_factory=Speed)

    @property
    def counted_from(self) -> float:
        return self.seconds / 4


@dataclass(slots=True)
class Report:
    """What an entry last heard of a node."""

    load: NodeLoad
    heard_at: float
    version: int
    bulk: bytes
    bulk_version: int


@dataclass(slots=True)
class Figures:
    """What was counted, of requests that came after the warm-up."""

    first_token_s: list[float] = field(default_factory=list)
    told: list[tuple[float, float]] = field(default_factory=list)  # Retry-After in s, and how long it really took
    asked: int = 0
    refusals: int = 0
    turned_away: int = 0  # by a node, after a router chose it
    prefill_tokens: int = 0
    answer_tokens: int = 0


class World:
    """Runs one setting under one policy. policy(entry): what chooses for that entry."""

    def __init__(self, setting: Setting, policy: Callable[[World, int], Policy]) -> None:
        self.setting = setting
        self.now = 0.0
        self.rng = random.Random(f"{setting.seed}|world")
        self.figures = Figures()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self._follow_ups = 1 << 40
        speed, slots = setting.speed, setting.slots
        self.engines = [
            Engine(speed, slots, setting.queue_limit, self.at, self._began, self._ended) for _ in range(setting.nodes)
        ]
        self.names = [f"node-{number}" for number in range(setting.nodes)]
        self._profile = NodeProfile(models=(ModelInfo(MODEL, "f", 4096, slots, setting.queue_limit),))
        idle = NodeLoad(Readiness.READY, models={MODEL: ModelLoad(free_slots=slots)})
        self._reports = [[Report(idle, 0.0, 0, b"", 0) for _ in self.engines] for _ in range(setting.entries)]
        self._published_queue = [0] * setting.nodes
        self._versions = [0] * setting.nodes
        self._bulks = [(b"", 0)] * setting.nodes
        self._is_hurried = [False] * setting.nodes
        self._policies = [policy(self, entry) for entry in range(setting.entries)]

    def run(self) -> Figures:
        setting = self.setting
        token_s = setting.speed.step(setting.slots) / setting.slots
        for request in arrivals(
            setting.trace,
            setting.seed,
            setting.load * setting.nodes,
            setting.speed.prefill_rate,
            token_s,
            setting.seconds,
        ):
            self.at(request.at, lambda request=request: self._ask(request))
        for node in range(setting.nodes):
            self.at(self.rng.random() * PUBLISH_INTERVAL_S, lambda node=node: self._publish(node))
            self.at(self.rng.random() * DIGEST_INTERVAL_S, lambda node=node: self._digest(node))
        self.at(setting.counted_from, self._warm)
        while self._events:
            self.now, _, action = heapq.heappop(self._events)
            if self.now > setting.seconds:
                break
            action()
        self.figures.prefill_tokens = sum(engine.prefilled_tokens for engine in self.engines)
        return self.figures

    def at(self, time: float, action: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._events, (time, self._sequence, action))

    def view(self, entry: int) -> ClusterView:
        """The cluster as the entry sees it now."""
        members = {}
        for node, (name, report) in enumerate(zip(self.names, self._reports[entry], strict=True)):
            is_self = node == entry
            load = self._load_of(node) if is_self else report.load
            members[name] = MemberView(
                name,
                ADDRESS,
                MemberStatus.ALIVE,
                1,
                report.version,
                load,
                self._profile,
                age_s=0.0,
                is_self=is_self,
                load_age_s=0.0 if is_self else self.now - report.heard_at,
                load_version=report.version,
                bulk=report.bulk,
                bulk_version=report.bulk_version,
            )
        return ClusterView(self.names[entry], self.now, members)

    def _load_of(self, node: int) -> NodeLoad:
        return NodeLoad(Readiness.READY, models={MODEL: self.engines[node].load(self.now)})

    def _warm(self) -> None:
        for engine in self.engines:
            engine.prefilled_tokens = 0

    # Gossip.

    def _publish(self, node: int, *, is_urgent: bool = False) -> None:
        self._is_hurried[node] = False
        self._versions[node] += 1
        load = self._load_of(node)
        self._published_queue[node] = load.models[MODEL].queued
        bulk, bulk_version = self._bulks[node]
        report = (load, self._versions[node], bulk, bulk_version)
        for entry in range(self.setting.entries):
            delay_s = self.rng.uniform(*DELAY_S)
            self.at(self.now + delay_s, lambda entry=entry: self._hear(entry, node, *report))
        if not is_urgent:
            self.at(self.now + PUBLISH_INTERVAL_S, lambda: self._publish(node))

    def _hear(self, entry: int, node: int, load: NodeLoad, version: int, bulk: bytes, bulk_version: int) -> None:
        if version > self._reports[entry][node].version:
            self._reports[entry][node] = Report(load, self.now, version, bulk, bulk_version)

    def _digest(self, node: int) -> None:
        bulk = encode_digest({MODEL: self.engines[node].conversations()})
        if bulk != self._bulks[node][0]:
            self._bulks[node] = bulk, self._versions[node] + 1
        self.at(self.now + DIGEST_INTERVAL_S, lambda: self._digest(node))

    def _hurry(self, node: int) -> None:
        """Publish at once where the queue jumped."""
        engine = self.engines[node]
        queued = max(0, engine.outstanding - engine.slots)
        if abs(queued - self._published_queue[node]) >= QUEUE_JUMP and not self._is_hurried[node]:
            self._is_hurried[node] = True
            due = math.ceil(self.now / LOAD_INTERVAL_S) * LOAD_INTERVAL_S
            self.at(due, lambda: self._publish(node, is_urgent=True))

    # Requests.

    def _ask(self, request: Request) -> None:
        """The client's request arrives at its entry, for the first time or again."""
        entry = request.entry % self.setting.entries
        request.tried_at = self.now
        if not request.refusals and request.at >= self.setting.counted_from:
            self.figures.asked += 1
        self._try(request, entry, frozenset())

    def _try(self, request: Request, entry: int, failed: frozenset[str]) -> None:
        policy = self._policies[entry]
        if len(failed) >= min(TRIES_MAX, self.setting.nodes):
            self._refuse(request, policy.refuse(request, failed))
            return
        chosen = policy.choose(request, failed)
        if isinstance(chosen, Refused):
            self._refuse(request, chosen.retry_after_s)
            return
        hop_s = 0.0 if chosen == entry else HOP_S
        self.at(self.now + hop_s, lambda: self._arrive(request, entry, chosen, failed))

    def _arrive(self, request: Request, entry: int, node: int, failed: frozenset[str]) -> None:
        policy = self._policies[entry]
        if self.engines[node].submit(request, self.now):
            policy.opened(request, node)
            request.entry = entry
            for when, told_s in request.refusals:
                if when >= self.setting.counted_from:
                    self.figures.told.append((told_s, self.now - when))
            request.refusals = request.refusals[:0] + [(-1.0, 0.0)] * bool(request.refusals)
        else:
            policy.finished(request)
            self.figures.turned_away += 1
            self.at(self.now + HOP_S, lambda: self._try(request, entry, failed | {self.names[node]}))
        self._hurry(node)

    def _refuse(self, request: Request, retry_after_s: float) -> None:
        told_s = max(1, math.ceil(retry_after_s))  # whole seconds, as HTTP has it
        request.refusals.append((self.now, told_s))
        if self.now >= self.setting.counted_from:
            self.figures.refusals += 1
        self.at(self.now + told_s + self.rng.uniform(0.0, 0.2), lambda: self._ask(request))

    def _began(self, request: Request, now: float) -> None:
        if request.at >= self.setting.counted_from:
            self.figures.first_token_s.append(now - request.tried_at)

    def _ended(self, request: Request, now: float) -> None:
        self._policies[request.entry % self.setting.entries].finished(request)
        if now >= self.setting.counted_from:
            self.figures.answer_tokens += request.answer_tokens
        self._follow_ups += 1
        following = next_turn(request, self._follow_ups, now)
        if following is not None:
            self.at(following.at, lambda: self._ask(following))
        for node, engine in enumerate(self.engines):
            if engine.waiting or self._published_queue[node]:
                self._hurry(node)
