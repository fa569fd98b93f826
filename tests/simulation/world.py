"""A mesh in one process and in virtual time: many production Gossip cores over a network that loses, delays and cuts.

Everything random comes from one seed, so a run is repeated by its seed. Time is seconds since the world began.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mesh.gossip import (
    DuplicateNode,
    Effect,
    ExchangeState,
    Fenced,
    Gossip,
    GossipConfig,
    MemberChanged,
    PingLink,
    SeedUnanswered,
    SendDatagram,
)
from mesh.seal import DEVELOPMENT_KEY, Keyring
from mesh.view import (
    Address,
    ClusterView,
    MemberStatus,
    ModelInfo,
    ModelLoad,
    NodeLoad,
    NodeProfile,
    NodeStatus,
    Readiness,
)

SOCKET_BUFFER_DATAGRAMS = 256  # what a stalled process's socket holds; more is lost, as in a kernel
WAKEUP_S = 0.0005  # between a timer and the process that waits for it


@dataclass(slots=True)
class Network:
    """What becomes of datagrams. Probabilities per datagram, delays in seconds."""

    loss: float = 0.0
    duplication: float = 0.0
    delay_min_s: float = 0.0002
    delay_max_s: float = 0.002  # beyond the spacing of datagrams, so they overtake each other
    cuts: set[tuple[str, str]] = field(default_factory=set)  # (from, to), one way each

    def partition(self, groups: Sequence[Iterable[str]]) -> None:
        """Cut every pair of names from different groups, both ways."""
        sides = [list(group) for group in groups]
        for a, b in itertools.permutations(sides, 2):
            self.cuts |= {(x, y) for x in a for y in b}

    def heal(self) -> None:
        self.cuts.clear()


class Checker(Protocol):
    """One invariant. Each method raises AssertionError where it is broken."""

    def on_send(self, world: World, node: SimNode, data: bytes) -> None: ...
    def on_change(self, world: World, node: SimNode, change: MemberChanged) -> None: ...
    def on_sample(self, world: World, node: SimNode, view: ClusterView) -> None: ...


class SimNode:
    """A process, or the place of one that was killed."""

    def __init__(self, name: str, address: Address) -> None:
        self.name = name
        self.address = address
        self.gossip: Gossip | None = None
        self.generation = 0
        self.started_at = 0.0
        self.stalled_until = 0.0
        self.inbox: list[tuple[bytes, Address]] = []
        self.wake_at = float("inf")
        self.seeds: tuple[Address, ...] = ()

    @property
    def core(self) -> Gossip:
        assert self.gossip is not None, f"{self.name} does not run"
        return self.gossip


@dataclass(frozen=True, slots=True)
class Transition:
    """One node's change of mind about another."""

    at: float
    observer: str
    change: MemberChanged


class World:
    """Nodes n0, n1, …; all have n0 for a seed unless told otherwise."""

    def __init__(self, seed: int, network: Network | None = None, checkers: Sequence[Checker] = ()) -> None:
        self.now = 0.0
        self.rng = random.Random(seed)
        self.network = network or Network()
        self.config = GossipConfig()
        self.nodes: dict[str, SimNode] = {}
        self.transitions: list[Transition] = []
        self.seeds_unanswered: list[SeedUnanswered] = []
        self.duplicates: list[DuplicateNode] = []
        self.fenced: list[tuple[str, Fenced]] = []
        self.datagrams = 0
        self._checkers = checkers
        self._keyring = Keyring([DEVELOPMENT_KEY])
        self._by_address: dict[Address, SimNode] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.at(0.25, self._sample)

    # --- time ---

    def at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), action))

    def run_until(self, time: float) -> None:
        while self._events and self._events[0][0] <= time:
            self.now, _, action = heapq.heappop(self._events)
            action()
        self.now = time

    def run_for(self, duration_s: float) -> None:
        self.run_until(self.now + duration_s)

    def run_while(self, condition: Callable[[], bool], limit_s: float, step_s: float = 0.02) -> float:
        """Run until the condition is false; returns how long it took. Raises AssertionError at the limit."""
        began = self.now
        while condition():
            assert self.now - began < limit_s, f"still so after {limit_s} s: {self.describe()}"
            self.run_for(step_s)
        return self.now - began

    # --- processes ---

    def add(self, count: int, *, seeds: tuple[str, ...] = ("n0",), spread_s: float = 0.0) -> None:
        """Start that many new nodes within spread_s."""
        for _ in range(count):
            index = len(self.nodes)
            node = SimNode(f"n{index}", Address(f"10.0.{index // 250}.{index % 250 + 1}", 7946))
            self.nodes[node.name] = node
            self._by_address[node.address] = node
            node.seeds = tuple(self.nodes[s].address for s in seeds if s in self.nodes)
            self.at(self.now + self.rng.random() * spread_s, lambda node=node: self.start(node.name))  # type: ignore[misc]

    def start(self, name: str, *, generation: int | None = None) -> None:
        node = self.nodes[name]
        assert node.gossip is None, f"{name} runs already"
        node.generation = node.generation + 1 if generation is None else generation
        node.started_at = self.now
        node.inbox.clear()
        node.wake_at = float("inf")
        boot_id = self.rng.randbytes(16)
        rng = random.Random(self.rng.random())
        node.gossip = Gossip(
            self.config, name, node.generation, node.address, node.seeds, self._keyring, boot_id, rng, self.now
        )
        node.gossip.set_load(ready_load(name, 0), self.now)
        node.gossip.set_profile(profile_of(name), self.now)
        self._reschedule(node)

    def kill(self, name: str) -> None:
        self.nodes[name].gossip = None
        self.nodes[name].inbox.clear()

    def leave(self, name: str) -> None:
        node = self.nodes[name]
        self._perform(node, node.core.leave(self.now))
        self.kill(name)

    def stall(self, name: str, duration_s: float) -> None:
        """The process stands still: its datagrams wait, its timers are late."""
        node = self.nodes[name]
        node.stalled_until = self.now + duration_s
        self.at(node.stalled_until, lambda: self._step(node))

    def set_load(self, name: str, load: NodeLoad) -> None:
        node = self.nodes[name]
        node.core.set_load(load, self.now)
        self._reschedule(node)

    def set_profile(self, name: str, profile: NodeProfile) -> None:
        node = self.nodes[name]
        node.core.set_profile(profile, self.now)
        self._reschedule(node)

    @property
    def running(self) -> list[SimNode]:
        return [node for node in self.nodes.values() if node.gossip is not None]

    # --- what they believe ---

    def view(self, name: str) -> ClusterView:
        return self.nodes[name].core.view(self.now)

    def status(self, observer: str, member: str) -> MemberStatus | None:
        found = self.view(observer).members.get(member)
        return None if found is None else found.status

    def all_see(self, member: str, status: MemberStatus) -> bool:
        return all(self.status(n.name, member) is status for n in self.running if n.name != member)

    def all_healthy(self) -> bool:
        """Every running node sees every running node healthy, its profile included.

        Where datagrams are lost a node may rightly doubt itself, so then it is not asked about itself."""
        names = [n.name for n in self.running]
        for observer in names:
            view = self.view(observer)
            for name in names:
                if name == observer and self.network.loss:
                    continue
                member = view.members.get(name)
                if member is None or view.status(member) is not NodeStatus.HEALTHY:
                    return False
                if member.profile != self.nodes[name].core.view(self.now).me.profile:
                    return False
        return True

    def deaths(self, since: float = 0.0) -> list[Transition]:
        return [t for t in self.transitions if t.at >= since and t.change.after.status is MemberStatus.DEAD]

    def describe(self) -> str:
        lines = []
        for node in self.running:
            others = [
                f"{m.node_id}:{m.status.name}@{m.generation}.{m.version}" for m in self.view(node.name).members.values()
            ]
            lines.append(f"{node.name} sees {' '.join(sorted(others))}")
        return f"at {self.now:.2f} s\n  " + "\n  ".join(lines)

    # --- inside ---

    def _sample(self) -> None:
        for node in self.running:
            if node.stalled_until <= self.now:
                view = node.core.view(self.now)
                for checker in self._checkers:
                    checker.on_sample(self, node, view)
        self.at(self.now + 0.25, self._sample)

    def _reschedule(self, node: SimNode) -> None:
        due = max(node.core.next_wakeup(), self.now) + WAKEUP_S
        if due < node.wake_at:
            node.wake_at = due
            core = node.core
            self.at(due, lambda: self._wake(node, core, due))

    def _wake(self, node: SimNode, core: Gossip, due: float) -> None:
        if node.wake_at == due:
            node.wake_at = float("inf")
        if node.gossip is core:
            self._step(node)

    def _step(self, node: SimNode) -> None:
        """One turn of the loop in mesh/udp.py: drain, then tick."""
        if node.gossip is None or self.now < node.stalled_until:
            return
        inbox, node.inbox = node.inbox, []
        for data, source in inbox:
            self._perform(node, node.gossip.receive(data, source, self.now))
        self._perform(node, node.gossip.tick(self.now))
        self._reschedule(node)

    def _deliver(self, address: Address, data: bytes, source: Address) -> None:
        node = self._by_address.get(address)
        if node is None or node.gossip is None or len(node.inbox) >= SOCKET_BUFFER_DATAGRAMS:
            return
        node.inbox.append((data, source))
        self._step(node)

    def _perform(self, node: SimNode, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case SendDatagram(address, data):
                    for checker in self._checkers:
                        checker.on_send(self, node, data)
                    self._send(node, address, data)
                case MemberChanged():
                    for checker in self._checkers:
                        checker.on_change(self, node, effect)
                    self.transitions.append(Transition(self.now, node.name, effect))
                case SeedUnanswered():
                    self.seeds_unanswered.append(effect)
                case DuplicateNode():
                    self.duplicates.append(effect)
                case PingLink():
                    pass  # no such help in this world: gossip alone must do
                case ExchangeState(node_id, _, question):
                    self._ask(node, node_id, question)
                case Fenced():
                    self.fenced.append((node.name, effect))

    def _ask(self, node: SimNode, name: str, question: bytes) -> None:
        """Over a peer link: reliable, but for cuts and processes that are gone."""
        asking = node.core
        target = self.nodes[name]

        def answer() -> None:
            cuts = self.network.cuts
            if target.gossip is None or (node.name, name) in cuts or (name, node.name) in cuts:
                asking.exchange_failed(name)
            else:
                data = target.gossip.answer_exchange(question)
                self.at(self.now + self.network.delay_max_s, lambda: take(data))

        def take(data: bytes) -> None:
            if node.gossip is asking:
                self._perform(node, asking.take_exchange(name, data, self.now))
                self._reschedule(node)

        self.at(self.now + 2 * self.network.delay_max_s, answer)

    def _send(self, node: SimNode, address: Address, data: bytes) -> None:
        self.datagrams += 1
        network = self.network
        target = self._by_address.get(address)
        if target is None or (node.name, target.name) in network.cuts:
            return
        for _ in range(2 if self.rng.random() < network.duplication else 1):
            if self.rng.random() >= network.loss:
                delay_s = self.rng.uniform(network.delay_min_s, network.delay_max_s)
                self.at(self.now + delay_s, lambda: self._deliver(address, data, node.address))


def ready_load(name: str, step_count: int, *, queued: int = 0) -> NodeLoad:
    """A load as a node of the built-in model has it. Numbers are such that 32-bit floats hold them."""
    model = ModelLoad(1, queued, 7, 2048.0, 24.5, step_count, 12)
    return NodeLoad(Readiness.READY, 1, 24.5, 0.0078125, {"demo": model})


def profile_of(name: str) -> NodeProfile:
    return NodeProfile(f"http://{name}:8080", "0.1.0", (ModelInfo("demo", "5eed" * 8, 2048, 8),))
