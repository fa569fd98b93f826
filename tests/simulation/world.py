"""A mesh in one process and in virtual time: many production Gossip cores over a network that loses, delays and cuts.

Everything random comes from one seed, so a run is repeated by its seed. Time is seconds since the world began; each
node has a clock of its own, which runs a little fast or slow and began anywhere."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

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
    UsageHeard,
)
from mesh.seal import DEVELOPMENT_KEY, Keyring
from mesh.view import Address, ClusterView, MemberStatus, NodeLoad, NodeProfile
from tests.simulation import inside
from tests.simulation.checkers.checker import Checker
from tests.simulation.dialects import DialectSealer
from tests.simulation.loads import profile_of, ready_load
from tests.simulation.network import Network
from tests.simulation.shortcuts import STAND_IN_NODES, StandInSealer
from tests.simulation.sim_node import Dialect, SimNode

SOCKET_BUFFER_DATAGRAMS = 256  # what a stalled process's socket holds; more is lost, as in a kernel
WAKEUP_S = 0.0005  # between a timer or a datagram and the process that waits for it
CLOCK_DRIFT = 200e-6  # how far a clock's rate may be from 1; crystals are within 100 ppm
SAMPLE_S = 0.25  # between two looks of the checkers at what nodes believe
SAMPLED_MAX = 64  # nodes that the checkers look at; in larger worlds a fixed random part


@dataclass(frozen=True, slots=True)
class Transition:
    """One node's change of mind about another, in the world's time."""

    at: float
    observer: str
    change: MemberChanged


class World:
    """Nodes n0, n1, …; all have n0 for a seed unless told otherwise.

    clock_drift: how far each node's clock may be from the true rate, as a share."""

    def __init__(
        self,
        seed: int,
        network: Network | None = None,
        checkers: Sequence[Checker] = (),
        *,
        config: GossipConfig | None = None,
        clock_drift: float = CLOCK_DRIFT,
    ) -> None:
        self.now = 0.0
        self.rng = random.Random(seed)
        self.network = network or Network()
        self.config = config or GossipConfig()
        self.nodes: dict[str, SimNode] = {}
        self.transitions: list[Transition] = []
        self.seeds_unanswered: list[SeedUnanswered] = []
        self.duplicates: list[DuplicateNode] = []
        self.fenced: list[tuple[str, Fenced]] = []
        self.datagrams = 0
        self.disturbed_at = 0.0  # when last something was done to the mesh from outside
        self.has_links = False  # whether PingLink is answered; without, gossip alone must do
        self.is_duplicate_meant = False  # two processes under one name are part of the scenario
        self.clock_drift = clock_drift
        self._keyring = Keyring([DEVELOPMENT_KEY])
        self._by_address: dict[Address, SimNode] = {}
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        # Only what a checker looks at costs a call.
        self._on_send = [c.on_send for c in checkers if type(c).on_send is not Checker.on_send]
        self._on_receive = [c for c in checkers if type(c).before_receive is not Checker.before_receive]
        self._on_change = [c.on_change for c in checkers if type(c).on_change is not Checker.on_change]
        self._on_sample = [c.on_sample for c in checkers if type(c).on_sample is not Checker.on_sample]
        self._sampled: list[SimNode] = []
        self.at(SAMPLE_S, self._sample)

    # --- time ---

    def at(self, time: float, action: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (time, next(self._order), action, arguments))

    def run_until(self, time: float) -> None:
        events = self._events
        while events and events[0][0] <= time:
            self.now, _, action, arguments = heapq.heappop(events)
            action(*arguments)
        self.now = time

    def run_for(self, duration_s: float) -> None:
        self.run_until(self.now + duration_s)

    def run_while(self, condition: Callable[[], bool], limit_s: float, step_s: float = 0.02) -> float:
        """Run until the condition is false; returns how long it took. Raises AssertionError at the limit.

        Large worlds are looked at less often, at most every 0.1 s: to look costs as much as to run."""
        step_s = max(step_s, min(0.1, len(self.nodes) / 1_000))
        began = self.now
        while condition():
            assert self.now - began < limit_s, f"still so after {limit_s} s: {self.describe()}"
            self.run_for(step_s)
        return self.now - began

    # --- processes ---

    def add(self, count: int, *, seeds: tuple[str, ...] = ("n0",), spread_s: float = 0.0) -> list[str]:
        """Start that many new nodes within spread_s; their names."""
        names = [self.place(f"n{len(self.nodes)}", seeds).name for _ in range(count)]
        for name in names:
            self.at(self.now + self.rng.random() * spread_s, self.start, name)
        return names

    def place(self, name: str, seeds: tuple[str, ...] = ("n0",)) -> SimNode:
        """A new place for a process, which does not run yet."""
        index = len(self.nodes)
        rate = 1.0 + self.rng.uniform(-self.clock_drift, self.clock_drift)
        address = Address(f"10.{index // 62_500}.{index // 250 % 250}.{index % 250 + 1}", 7946)
        node = self.nodes[name] = SimNode(name, address, rate, self.rng.uniform(0.0, 1e5))
        self._by_address[address] = node
        node.seeds = tuple(self.nodes[s].address for s in seeds if s in self.nodes)
        return node

    def start(self, name: str, *, generation: int | None = None, node_id: str | None = None) -> None:
        """Run a process at this place. node_id: a name other than that of the place, for duplicates.

        generation: what its data directory says; one more than before unless given."""
        node = self.nodes[name]
        assert node.gossip is None, f"{name} runs already"
        node.generation = node.generation + 1 if generation is None else generation
        node.started_at = self.disturbed_at = self.now
        node.inbox.clear()
        node.wake_at = float("inf")
        boot_id = self.rng.randbytes(16)
        rng = random.Random(self.rng.random())
        clock = node.clock(self.now)
        core = node.gossip = Gossip(
            self.config, node_id or name, node.generation, node.address, node.seeds, self._keyring, boot_id, rng, clock
        )
        self._replace_sealer(node, core, boot_id)
        core.set_load(ready_load(name, 0), clock)
        core.set_profile(profile_of(name), clock)
        self._reschedule(node)

    def _replace_sealer(self, node: SimNode, core: Gossip, boot_id: bytes) -> None:
        sealer: Any = core._sealer
        if len(self.nodes) > STAND_IN_NODES:
            sealer = StandInSealer(boot_id)
        if node.dialect is not None:
            sealer = DialectSealer(sealer, node.dialect)
        core._sealer = core._outbox._sealer = core._reception._sealer = sealer

    def set_dialect(self, name: str, dialect: Dialect) -> None:
        """From its next start on the node speaks another version of the protocol."""
        self.nodes[name].dialect = dialect

    def kill(self, name: str) -> None:
        self.nodes[name].gossip = None
        self.nodes[name].inbox.clear()
        self.disturbed_at = self.now

    def leave(self, name: str) -> None:
        node = self.nodes[name]
        self._perform(node, node.core.leave(node.clock(self.now)))
        self.kill(name)

    def stall(self, name: str, duration_s: float) -> None:
        """The process stands still: its datagrams wait, its timers are late."""
        node = self.nodes[name]
        node.stalled_until = max(node.stalled_until, self.now + duration_s)
        self.disturbed_at = self.now + duration_s
        self.at(node.stalled_until, self._wake, node, node.core, None)

    def set_load(self, name: str, load: NodeLoad) -> None:
        node = self.nodes[name]
        node.core.set_load(load, node.clock(self.now))
        self._reschedule(node)

    def set_profile(self, name: str, profile: NodeProfile) -> None:
        node = self.nodes[name]
        node.core.set_profile(profile, node.clock(self.now))
        self.disturbed_at = self.now
        self._reschedule(node)

    def set_bulk(self, name: str, bulk: bytes) -> None:
        node = self.nodes[name]
        node.core.set_bulk(bulk, node.clock(self.now))
        self._reschedule(node)

    def cut(self, pairs: set[tuple[str, str]]) -> None:
        """Nothing goes from the first of each pair to the second from now on."""
        self.network.cuts |= pairs
        self.disturbed_at = self.now

    def heal(self) -> None:
        self.network.heal()
        self.disturbed_at = self.now

    @property
    def running(self) -> list[SimNode]:
        return [node for node in self.nodes.values() if node.gossip is not None]

    # --- peer links ---

    def request(
        self,
        node: SimNode,
        address: Address,
        ask: Callable[[SimNode], Any],
        answered: Callable[[Any], None],
        refused: Callable[[], None] = lambda: None,
    ) -> None:
        """A request over a peer link: `ask` runs at the target, `answered` with what it returned at the asker, each
        after a delay and not while its process stands still. Refused across a cut, or where nobody runs.

        What an effect of the core that needs a link is performed with; its bytes do not count as datagrams."""
        core = node.core

        def arrive() -> None:
            target = self._by_address.get(address)
            if target is None or target.gossip is None or node.gossip is not core:
                return refuse()
            if target.stalled_until > self.now:
                return self.at(target.stalled_until, arrive)
            answer = ask(target)
            self._reschedule(target)
            delay_s = self.network.link_delay_s(self.rng, target.name, node.name)
            return refuse() if delay_s is None else self.at(self.now + delay_s, finish, answer)

        def finish(answer: Any) -> None:
            if node.gossip is core:
                answered(answer)
                self._reschedule(node)

        def refuse() -> None:
            if node.gossip is core:
                refused()
                self._reschedule(node)

        target = self._by_address.get(address)
        delay_s = None if target is None else self.network.link_delay_s(self.rng, node.name, target.name)
        if delay_s is None:
            refuse()
        else:
            self.at(self.now + delay_s, arrive)

    def _ping_link(self, node: SimNode, node_id: str, address: Address) -> None:
        def answered(found: str) -> None:
            if found == node_id:
                node.core.link_answered(node_id, node.clock(self.now))

        self.request(node, address, lambda target: target.core.node_id, answered)

    def _exchange(self, node: SimNode, node_id: str, address: Address, question: bytes) -> None:
        def answered(answer: bytes) -> None:
            self._perform(node, node.core.take_exchange(node_id, answer, node.clock(self.now)))

        self.request(
            node,
            address,
            lambda target: target.core.answer_exchange(question, target.clock(self.now)),
            answered,
            lambda: node.core.exchange_failed(node_id),
        )

    # --- what they believe ---

    def view(self, name: str) -> ClusterView:
        node = self.nodes[name]
        return node.core.view(node.clock(self.now))

    def status(self, observer: str, member: str) -> MemberStatus | None:
        found = inside.row(self.nodes[observer].core, member)
        return None if found is None else found.status

    def all_see(self, member: str, status: MemberStatus) -> bool:
        return all(self.status(n.name, member) is status for n in self.running if n.name != member)

    def deaths(self, since: float = 0.0) -> list[Transition]:
        return [t for t in self.transitions if t.at >= since and t.change.after.status is MemberStatus.DEAD]

    def describe(self) -> str:
        """What all believe; of a large world, what some do about those they doubt."""
        lines = []
        is_large = len(self.nodes) > 16
        for node in self.running[:64]:
            others = [
                f"{m.node_id}:{m.status.name}@{m.generation}.{m.version}"
                for m in inside.table(node.core).members.values()
                if not (is_large and m.status is MemberStatus.ALIVE)
            ]
            lines.append(f"{node.name} sees {' '.join(sorted(others))}")
        return f"at {self.now:.2f} s\n  " + "\n  ".join(lines)

    # --- inside ---

    def _sample(self) -> None:
        if self._on_sample:
            running = self.running
            if len(running) > SAMPLED_MAX:
                self._sampled = [n for n in self._sampled if n.gossip is not None]
                missing = SAMPLED_MAX // 4 - len(self._sampled)
                self._sampled += self.rng.sample(running, max(0, missing))
                running = self._sampled
            for node in running:
                if node.stalled_until <= self.now:
                    for on_sample in self._on_sample:
                        on_sample(self, node)
        self.at(self.now + SAMPLE_S, self._sample)

    def _reschedule(self, node: SimNode) -> None:
        if node.gossip is None:
            return
        due = max(node.time_of(node.gossip.next_wakeup()), self.now) + WAKEUP_S
        if due < node.wake_at:
            node.wake_at = due
            self.at(due, self._wake, node, node.gossip, due)

    def _wake(self, node: SimNode, core: Gossip, due: float | None) -> None:
        if due is not None and node.wake_at != due:
            return  # something sooner took its place
        node.wake_at = float("inf")
        if node.gossip is core:
            self._step(node, core)

    def _step(self, node: SimNode, core: Gossip) -> None:
        """One turn of the loop in mesh/udp.py: drain, then tick."""
        if self.now < node.stalled_until:
            return
        clock = node.clock(self.now)
        inbox, node.inbox = node.inbox, []
        for data, source in inbox:
            self.receive(node, data, source)
        self._perform(node, core.tick(clock))
        self._reschedule(node)

    def receive(self, node: SimNode, data: bytes, source: Address) -> None:
        """Hand a datagram to a node now."""
        for checker in self._on_receive:
            checker.before_receive(self, node, data, source)
        effects = node.core.receive(data, source, node.clock(self.now))
        for checker in self._on_receive:
            checker.after_receive(self, node, data, source)
        self._perform(node, effects)

    def _deliver(self, address: Address, data: bytes, source: Address) -> None:
        node = self._by_address.get(address)
        if node is None or node.gossip is None or len(node.inbox) >= SOCKET_BUFFER_DATAGRAMS:
            return
        node.inbox.append((data, source))
        due = self.now + WAKEUP_S
        if due < node.wake_at:
            node.wake_at = due
            self.at(due, self._wake, node, node.gossip, due)

    def _perform(self, node: SimNode, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case SendDatagram(address, data):
                    for on_send in self._on_send:
                        on_send(self, node, data)
                    self._send(node, address, data)
                case MemberChanged():
                    for on_change in self._on_change:
                        on_change(self, node, effect)
                    self.transitions.append(Transition(self.now, node.name, effect))
                case SeedUnanswered():
                    self.seeds_unanswered.append(effect)
                case DuplicateNode():
                    self.duplicates.append(effect)
                case PingLink(node_id, address):
                    if self.has_links:
                        self._ping_link(node, node_id, address)
                case ExchangeState(node_id, address, question):
                    self._exchange(node, node_id, address, question)
                case UsageHeard():
                    pass  # tests/simulation/limits has a world of its own
                case Fenced():
                    self.fenced.append((node.name, effect))
                case _:
                    assert_never(effect)

    def _send(self, node: SimNode, address: Address, data: bytes) -> None:
        self.datagrams += 1
        target = self._by_address.get(address)
        if target is not None:
            for delay_s in self.network.arrivals(self.rng, node.name, target.name):
                self.at(self.now + delay_s, self._deliver, address, data, node.address)
