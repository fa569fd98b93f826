"""Nodes, entries and time. What an entry hears of the others is routing.hearsay's; its own row is as of now."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

from mesh.view import ModelInfo, NodeLoad, NodeProfile, Readiness
from tests.simulation.routing.engine import Engine, Speed
from tests.simulation.routing.hearsay import Hearsay
from tests.simulation.routing.policies import Policy, Refused
from tests.simulation.routing.traces import Request, Trace, arrivals, next_turn

MODEL = "demo"
HOP_S = 0.001  # a request to a node, and a refusal back
TRIES_MAX = 4  # nodes tried for one request


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
        self.names = [f"n{number}" for number in range(setting.nodes)]
        self._profile = NodeProfile(models=(ModelInfo(MODEL, "f", 4096, slots, setting.queue_limit),))
        self._hearsay: Hearsay | None = None
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
        self.at(setting.counted_from, self._warm)
        with self._hearsay.settled(self.at) if self._hearsay is not None else nullcontext():
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

    def listen(self) -> Hearsay:
        """What entries hear of the nodes; for policies that know no more than that."""
        if self._hearsay is None:
            self._hearsay = Hearsay(
                self.setting.nodes,
                self.setting.seed,
                self._profile,
                load=self._load_of,
                conversations=lambda node: {MODEL: self.engines[node].conversations()},
                decoding=lambda node: {run.request.entry for run in self.engines[node].decoding},
                open_at=lambda node: {run.request.entry for run in self.engines[node].runs()},
            )
        return self._hearsay

    def _load_of(self, node: int) -> NodeLoad:
        return NodeLoad(Readiness.READY, models={MODEL: self.engines[node].load(self.now)})

    def _warm(self) -> None:
        for engine in self.engines:
            engine.prefilled_tokens = 0

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
