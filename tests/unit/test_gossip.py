"""One Gossip, or a few joined by hand: what it does with datagrams, time, and what it is told."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import exchange, packets, wire
from mesh.admission import PEER_BURST
from mesh.contacts import SEEDS_ADDED_MAX
from mesh.errors import MalformedDatagram
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
from mesh.seal import DEVELOPMENT_KEY, DatagramSealer, Keyring, Opened
from mesh.state import encode_load
from mesh.view import Address, MemberStatus, MemberView, ModelInfo, ModelLoad, NodeLoad, NodeProfile, Readiness

KEYS = Keyring([DEVELOPMENT_KEY])
READY = NodeLoad(Readiness.READY, 1, 8.0, 0.0, {"demo": ModelLoad(1, 0, 7)})
PROFILE = NodeProfile("10.0.0.1:8080", "0.1.0", (ModelInfo("demo", "ab12", 2048, 8),))
KNOWN_BOOTS = (b"b" * 16, b"c" * 16)  # processes whose datagrams every gossip() here takes
NOBODY = Address("10.9.9.9", 7946)


def address(name: str) -> Address:
    return Address(f"10.0.0.{ord(name[0]) - 96}", 7946)


def gossip(
    name: str = "a",
    *,
    seeds: tuple[Address, ...] = (),
    generation: int = 1,
    at: Address | None = None,
    now: float = 0.0,
) -> Gossip:
    boot_id = f"{name} boot {generation} {at}".encode()[:16].ljust(16)
    rng = random.Random(f"{name}{generation}")
    made = Gossip(GossipConfig(), name, generation, at or address(name), seeds, KEYS, boot_id, rng, now)
    for known in KNOWN_BOOTS:
        made._sealer.admit(Opened(known, 0, b"", is_admitted=False))
        for place in (*map(address, "bcd"), NOBODY):
            made._reception._admission.note(known, place)
    made.set_load(READY, now)
    made.set_profile(PROFILE, now)
    return made


class Wire:
    """Delivers datagrams between Gossips at once and runs their timers; keeps all other effects."""

    def __init__(self, *nodes: Gossip) -> None:
        self.nodes = {node._own.address: node for node in nodes}
        self.now = 0.0
        self.effects: list[tuple[str, Effect]] = []
        self.cut: set[Address] = set()  # nothing reaches these
        for node in nodes:
            self.perform(node, node.tick(self.now))

    def perform(self, node: Gossip, effects: list[Effect]) -> None:
        for effect in effects:
            self.effects.append((node.node_id, effect))
            if isinstance(effect, ExchangeState):
                self.ask(node, effect)
            if isinstance(effect, SendDatagram):
                target = self.nodes.get(effect.address)
                if target is not None and effect.address not in self.cut and node._own.address not in self.cut:
                    self.perform(target, target.receive(effect.data, node._own.address, self.now))

    def ask(self, node: Gossip, effect: ExchangeState) -> None:
        target = self.nodes.get(effect.address)
        if target is None or effect.address in self.cut or node._own.address in self.cut:
            node.exchange_failed(effect.node_id)
        else:
            answer = target.answer_exchange(effect.question, self.now)
            self.perform(node, node.take_exchange(effect.node_id, answer, self.now))

    def run(self, duration_s: float) -> None:
        end = self.now + duration_s
        while (due := min(node.next_wakeup() for node in self.nodes.values())) <= end:
            self.now = max(self.now, due)
            for node in list(self.nodes.values()):
                if node.next_wakeup() <= self.now:
                    self.perform(node, node.tick(self.now))
        self.now = end

    def member(self, observer: Gossip, name: str) -> MemberView:
        return observer.view(self.now).members[name]

    def of_type(self, kind: type) -> list[Effect]:
        return [effect for _, effect in self.effects if isinstance(effect, kind)]


def sealed(message: packets.Message, *records: packets.Record, sender: str = "b", boot: bytes = b"b" * 16) -> bytes:
    """A datagram from b, as any holder of the key can make it. Once for each boot."""
    return DatagramSealer(KEYS, boot).seal(wire.encode(packets.Packet(sender, message, records)))


def record(
    name: str,
    version: int = 1,
    *,
    generation: int = 1,
    status: MemberStatus = MemberStatus.ALIVE,
    at: Address | None = None,
    hot: bytes | None = None,
) -> packets.Record:
    return packets.Record(name, generation, version, status, at or address(name), hot=hot)


def packets_of(effects: list[Effect], boot: bytes = b"reader".ljust(16)) -> list[tuple[Address, packets.Packet]]:
    """The datagrams among effects, opened."""
    opener = DatagramSealer(KEYS, boot)
    return [(e.address, wire.decode(opener.open(e.data).payload)) for e in effects if isinstance(e, SendDatagram)]


# --- joining, leaving, failing ---


def test_two_nodes_join_and_see_each_other_whole() -> None:
    a, b = gossip("a"), gossip("b", seeds=(address("a"),))
    mesh = Wire(a, b)
    for observer, name in ((a, "b"), (b, "a")):
        seen = mesh.member(observer, name)
        assert (seen.status, seen.load, seen.profile) == (MemberStatus.ALIVE, READY, PROFILE)
        assert seen.load_version == seen.version


def test_a_third_learns_of_the_second_from_the_first() -> None:
    a, b = gossip("a"), gossip("b", seeds=(address("a"),))
    c = gossip("c", seeds=(address("a"),))
    mesh = Wire(a, b, c)
    mesh.run(1.0)
    assert set(c.view(mesh.now).members) == {"a", "b", "c"} == set(b.view(mesh.now).members)


def test_an_own_address_among_the_seeds_is_not_called() -> None:
    a = gossip("a", seeds=(address("a"),))
    assert not packets_of(a.tick(0.0))


def test_an_unanswered_seed_is_called_each_half_second_and_reported_ever_less_often() -> None:
    a = gossip("a", seeds=(NOBODY,))
    mesh = Wire(a)
    mesh.run(8.2)
    assert len(mesh.of_type(SendDatagram)) == 17
    told = [(silence.attempts, silence.is_lasting) for silence in mesh.of_type(SeedUnanswered)]
    assert told == [(1, False), (2, False), (4, False), (8, False), (10, True), (16, False)]


def test_a_seed_that_joined_by_itself_is_not_called_silent() -> None:
    a, c = gossip("a"), gossip("c", seeds=(address("a"), address("b")))
    mesh = Wire(a, c)
    mesh.run(1.0)
    mesh.nodes[address("b")] = gossip("b", seeds=(address("a"),), now=mesh.now)
    mesh.run(30.0)
    assert mesh.member(c, "b").is_live
    assert mesh.of_type(SeedUnanswered) == []
    del mesh.nodes[address("b")]
    mesh.run(60.0)
    assert {silence.address for silence in mesh.of_type(SeedUnanswered)} == {address("b")}


def test_a_seed_that_answers_late_is_joined() -> None:
    a, b = gossip("a"), gossip("b", seeds=(address("a"),))
    mesh = Wire(a, b)
    mesh = Wire(b)
    mesh.run(3.0)
    late = gossip("a", generation=2, now=mesh.now)
    mesh.nodes[address("a")] = late
    mesh.run(8.0)
    assert mesh.member(b, "a").generation == 2


def test_a_farewell_is_seen_at_once_and_nothing_follows_it() -> None:
    a, b = gossip("a"), gossip("b", seeds=(address("a"),))
    mesh = Wire(a, b)
    mesh.perform(b, b.leave(mesh.now))
    assert mesh.member(a, "b").status is MemberStatus.LEFT
    assert b.next_wakeup() == float("inf")
    assert b.tick(9.0) == b.leave(9.0) == b.receive(b"anything", NOBODY, 9.0) == []


def test_a_silent_node_is_suspected_then_dead_within_five_seconds() -> None:
    a, b, c = gossip("a"), gossip("b", seeds=(address("a"),)), gossip("c", seeds=(address("a"),))
    mesh = Wire(a, b, c)
    mesh.run(5.0)
    mesh.cut.add(address("c"))
    del mesh.nodes[address("c")]
    mesh.effects.clear()
    mesh.run(6.0)
    for observer in ("a", "b"):
        told = [e for name, e in mesh.effects if name == observer and isinstance(e, MemberChanged)]
        assert [e.after.status for e in told] == [MemberStatus.SUSPECT, MemberStatus.DEAD]
        assert told[0].before is not None
    assert mesh.of_type(PingLink)
    assert a.statistics().deaths + b.statistics().deaths >= 1


def test_a_dead_node_that_speaks_again_is_called_and_back() -> None:
    a, b = gossip("a"), gossip("b", seeds=(address("a"),))
    mesh = Wire(a, b)
    mesh.run(3.0)
    mesh.cut.add(address("b"))
    mesh.run(20.0)
    assert mesh.member(a, "b").status is mesh.member(b, "a").status is MemberStatus.DEAD
    mesh.cut.clear()
    mesh.run(3.0)
    assert mesh.member(a, "b").status is mesh.member(b, "a").status is MemberStatus.ALIVE


def test_a_suspected_node_refutes_with_a_newer_version() -> None:
    a = gossip("a")
    a.tick(0.0)
    held = a.view(0.0).me.version
    effects = a.receive(
        sealed(packets.Rumour(), record("b"), record("a", held, status=MemberStatus.SUSPECT)), address("b"), 0.01
    )
    answers = [(to, r) for to, packet in packets_of(effects) for r in packet.records if r.node_id == "a"]
    assert answers[0][0] == address("b")
    assert answers[0][1].version > held
    assert answers[0][1].status is MemberStatus.ALIVE
    assert (a.statistics().refutations, a.statistics().awareness) == (1, 1)


def test_a_suspicion_of_a_former_version_is_answered_with_the_present_one() -> None:
    a = gossip("a")
    for second in range(3):
        a.tick(float(second))
    held = a.view(2.0).me.version
    suspicion = record("a", held - 1, status=MemberStatus.SUSPECT)
    effects = a.receive(sealed(packets.Rumour(), record("b"), suspicion), address("b"), 2.1)
    assert any(r == record("a", held) or r.version == held for _, p in packets_of(effects) for r in p.records)
    assert a.statistics().refutations == 0


@pytest.mark.parametrize("status", [MemberStatus.SUSPECT, MemberStatus.DEAD])
def test_who_doubts_a_member_at_a_former_version_is_told_the_newer_one(status: MemberStatus) -> None:
    a = gossip("a")
    a.receive(sealed(packets.Rumour(), record("c", 9)), address("b"), 0.0)
    doubt = a.receive(sealed(packets.Rumour(), record("c", 8, status=status), boot=b"c" * 16), address("b"), 0.1)
    told = [r for to, p in packets_of(doubt) if to == address("b") for r in p.records if r.node_id == "c"]
    assert [(r.version, r.status) for r in told] == [(9, MemberStatus.ALIVE)]
    at_the_same = a.receive(sealed(packets.Rumour(), record("c", 9, status=status), boot=b"d" * 16), address("b"), 0.2)
    assert not [r for _, p in packets_of(at_the_same) if isinstance(p.message, packets.Delta) for r in p.records]


# --- evidence ---


def test_an_answer_over_the_link_spares_a_member_the_suspicion() -> None:
    a = gossip("a")
    a.tick(0.0)
    a.receive(sealed(packets.Rumour(), record("b")), address("b"), 0.0)
    now, pinged = 0.0, False
    while now < 6.0:
        now = max(now, a.next_wakeup())
        for effect in a.tick(now):
            if isinstance(effect, PingLink):
                pinged = True
                a.link_answered(effect.node_id, now)
    assert pinged
    assert a.view(now).members["b"].status is MemberStatus.ALIVE


def test_a_broken_link_has_its_member_probed_at_once() -> None:
    a, b = gossip("a"), gossip("b", seeds=(address("a"),))
    mesh = Wire(a, b)
    mesh.run(2.3)
    a.tick(mesh.now)
    a.link_failed("b", mesh.now)
    a.link_failed("nobody", mesh.now)
    assert a.next_wakeup() <= mesh.now
    [(to, packet)] = [(to, p) for to, p in packets_of(a.tick(mesh.now)) if isinstance(p.message, packets.Ping)]
    assert (to, packet.message.target) == (address("b"), "b")  # type: ignore[union-attr]


def test_a_load_seen_on_a_link_shows_until_the_next_publication() -> None:
    a, b = gossip("a"), gossip("b", seeds=(address("a"),))
    mesh = Wire(a, b)
    mesh.run(0.5)
    version = mesh.member(a, "b").load_version
    a.observe_load("b", replace(READY, active_requests=7), mesh.now)
    seen = mesh.member(a, "b")
    assert (seen.load.active_requests, seen.load_age_s, seen.load_version) == (7, 0.0, version)
    mesh.run(1.0)
    assert mesh.member(a, "b").load.active_requests == 1


@pytest.mark.parametrize(("later", "seen"), [(1, 7), (2, 1)])
def test_a_publication_made_before_what_the_link_brought_does_not_replace_it(later: int, seen: int) -> None:
    a, b = gossip("a"), gossip("b", seeds=(address("a"),))
    mesh = Wire(a, b)
    mesh.run(0.5)
    version = mesh.member(a, "b").load_version
    a.observe_load("b", replace(READY, active_requests=7, after_version=version + 1), mesh.now)
    fresh = record("b", version=version + later, hot=encode_load(READY))
    a.receive(sealed(packets.Rumour(), fresh), address("b"), mesh.now)
    member = mesh.member(a, "b")
    assert (member.load.active_requests, member.load_version) == (seen, version + later)


def test_usage_in_a_publication_is_told_also_where_its_load_is_old() -> None:
    a, b = gossip("a"), gossip("b", seeds=(address("a"),))
    mesh = Wire(a, b)
    mesh.run(0.5)
    version = mesh.member(a, "b").load_version
    a.observe_load("b", replace(READY, after_version=version + 1), mesh.now)
    fresh = record("b", version=version + 1, hot=encode_load(replace(READY, usage=b"a section")))
    effects = a.receive(sealed(packets.Rumour(), fresh), address("b"), mesh.now)
    assert UsageHeard("b", b"a section") in effects


def test_a_ping_meant_for_another_is_not_answered() -> None:
    a = gossip("a")
    assert not packets_of(a.receive(sealed(packets.Ping(1, "z"), record("b")), address("b"), 1.0))
    [(to, packet)] = packets_of(a.receive(sealed(packets.Ping(2, "a"), boot=b"c" * 16), address("b"), 1.0))
    assert (to, packet.message) == (address("b"), packets.Ack(2, "a"))


def test_a_ping_request_is_passed_on_and_its_answer_returned() -> None:
    a, c = gossip("a"), gossip("c")
    asked = a.receive(sealed(packets.PingRequest(9, "c", address("c")), record("b")), address("b"), 1.0)
    [ping] = [e for e in asked if isinstance(e, SendDatagram)]
    c._reception.vouch(a._sealer._boot_id, address("a"))
    [ack] = [e for e in c.receive(ping.data, address("a"), 1.0) if isinstance(e, SendDatagram)]
    returned = packets_of(a.receive(ack.data, address("c"), 1.0))
    [(to, packet)] = [(to, p) for to, p in returned if isinstance(p.message, packets.Ack)]
    assert (to, packet.message) == (address("b"), packets.Ack(9, "c"))
    assert "c" in [r.node_id for r in packet.records]


# --- what is published ---


def test_a_publication_each_second_and_each_with_a_greater_version() -> None:
    a = gossip("a")
    versions = []
    for second in range(4):
        a.tick(second * 1.0)
        versions.append(a.view(second * 1.0).me.version)
    assert versions == sorted(set(versions))


@pytest.mark.parametrize(
    ("load", "urgent"),
    [
        pytest.param(replace(READY, readiness=Readiness.DRAINING), True, id="draining"),
        pytest.param(replace(READY, models={"demo": ModelLoad(8, 20, 0)}), True, id="queue jump"),
        pytest.param(replace(READY, active_requests=5), False, id="one more stream"),
    ],
)
def test_only_an_urgent_load_is_published_before_its_time(load: NodeLoad, urgent: bool) -> None:
    a, b = gossip("a"), gossip("b", seeds=(address("a"),))
    mesh = Wire(a, b)
    mesh.run(2.5)
    a.set_load(load, mesh.now)
    mesh.run(0.1)
    assert (mesh.member(b, "a").load == load) is urgent
    mesh.run(1.0)
    assert mesh.member(b, "a").load == load


def test_a_load_that_fits_no_datagram_is_refused_and_the_former_stays() -> None:
    a = gossip("a")
    with pytest.raises(ValueError, match="60 models"):
        a.set_load(NodeLoad(models={f"model-{i}-of-many": ModelLoad() for i in range(60)}), 1.0)
    assert a.view(1.0).me.load == READY


def test_a_new_profile_reaches_peers_at_once() -> None:
    a, b = gossip("a"), gossip("b", seeds=(address("a"),))
    mesh = Wire(a, b)
    mesh.run(2.3)
    a.set_profile(replace(PROFILE, version="0.2.0"), mesh.now)
    mesh.run(0.1)
    assert mesh.member(b, "a").profile.version == "0.2.0"


def test_whom_the_packet_budget_leaves_out_is_told_of_a_publication_a_little_later() -> None:
    config = replace(GossipConfig(), packet_rate=16.0, packet_burst=16)
    names = [f"{letter}" for letter in "abcdefghijklmnopqrstuv"]
    nodes = [
        Gossip(config, n, 1, address(n), (address("a"),), KEYS, n.encode() * 16, random.Random(n), 0.0) for n in names
    ]
    mesh = Wire(*nodes)
    mesh.run(12.0)
    for turn in range(4):
        nodes[0].set_load(replace(READY, active_requests=turn, models={"m": ModelLoad(queued=10 * turn)}), mesh.now)
        mesh.run(2.0)
        seen = [mesh.member(node, "a").load.active_requests for node in nodes[1:]]
        assert seen == [turn] * len(seen)


def test_sections_that_share_no_datagram_still_both_arrive() -> None:
    models = tuple(ModelInfo(f"a model with a long name, number {i}", "ab" * 16, 2048, 8) for i in range(12))
    loads = {m.name: ModelLoad(1, 2, 3, 4.0, 5.0, 6, 7) for m in models}
    a, b = gossip("a"), gossip("b", seeds=(address("a"),))
    a.set_profile(NodeProfile("h", "v", models), 0.0)
    a.set_load(replace(READY, models=loads), 0.0)
    mesh = Wire(a, b)
    mesh.run(3.0)
    assert len(mesh.member(b, "a").profile.models) == len(mesh.member(b, "a").load.models) == 12


# --- identity ---


def test_a_node_whose_generation_was_lost_takes_the_next_one() -> None:
    a, b = gossip("a"), gossip("b", seeds=(address("a"),), generation=7)
    mesh = Wire(a, b)
    mesh.run(2.0)
    reborn = gossip("b", seeds=(address("a"),), generation=1, now=mesh.now)
    mesh.nodes[address("b")] = reborn
    mesh.run(2.0)
    assert reborn.view(mesh.now).me.generation == 8
    assert (mesh.member(a, "b").generation, mesh.member(a, "b").status) == (8, MemberStatus.ALIVE)
    assert not mesh.of_type(DuplicateNode)


def test_a_second_process_under_a_living_name_is_reported_and_ignored() -> None:
    a, b = gossip("a"), gossip("b", seeds=(address("a"),), generation=3)
    mesh = Wire(a, b)
    mesh.run(2.0)
    elsewhere = Address("10.0.0.99", 7946)
    second = gossip("b", seeds=(address("a"),), generation=3, at=elsewhere, now=mesh.now)
    mesh.nodes[elsewhere] = second
    mesh.run(20.0)
    seen = mesh.member(a, "b")
    assert (seen.address, seen.status, seen.generation) == (address("b"), MemberStatus.ALIVE, 3)
    told_by_a = [e for name, e in mesh.effects if name == "a" and isinstance(e, DuplicateNode)]
    assert DuplicateNode("b", elsewhere) in told_by_a
    assert len(told_by_a) <= 3
    assert second.view(mesh.now).me.generation == 3


def test_a_restart_under_the_next_generation_replaces_the_former_process() -> None:
    a, b = gossip("a"), gossip("b", seeds=(address("a"),))
    mesh = Wire(a, b)
    mesh.run(1.0)
    mesh.nodes[address("b")] = gossip("b", seeds=(address("a"),), generation=2, now=mesh.now)
    mesh.run(0.5)
    assert (mesh.member(a, "b").generation, mesh.member(a, "b").profile) == (2, PROFILE)


@pytest.mark.parametrize("node_id", ["", "x" * 65], ids=["empty", "too long"])
def test_an_impossible_name_is_refused(node_id: str) -> None:
    with pytest.raises(ValueError, match="1 to 64 bytes"):
        Gossip(GossipConfig(), node_id, 1, NOBODY, (), KEYS, b"b" * 16, random.Random(1), 0.0)


def test_a_younger_process_under_a_living_name_gives_up_and_the_older_stays() -> None:
    a, b = gossip("a"), gossip("b", seeds=(address("a"),))
    mesh = Wire(a, b)
    mesh.run(2.0)
    elsewhere = Address("10.0.0.99", 7946)
    mesh.nodes[elsewhere] = gossip("b", seeds=(address("a"),), generation=9, at=elsewhere, now=mesh.now)
    mesh.run(7.0)
    assert not mesh.of_type(Fenced)
    mesh.run(4.0)
    assert mesh.of_type(Fenced) == [Fenced(address("b"))]
    assert (mesh.member(a, "b").address, mesh.member(a, "b").generation) == (address("b"), 1)


def test_a_process_that_stood_still_until_another_took_its_place_gives_up_when_it_wakes() -> None:
    a, b = gossip("a"), gossip("b", seeds=(address("a"),))
    mesh = Wire(a, b)
    mesh.run(5.0)
    asleep = mesh.nodes.pop(address("b"))
    elsewhere = Address("10.0.0.99", 7946)
    mesh.nodes[elsewhere] = gossip("b", seeds=(address("a"),), generation=2, at=elsewhere, now=mesh.now)
    mesh.run(30.0)
    assert mesh.member(a, "b").address == elsewhere
    mesh.nodes[address("b")] = asleep
    mesh.run(20.0)
    assert mesh.of_type(Fenced) == [Fenced(elsewhere)]
    assert (mesh.member(a, "b").address, mesh.member(a, "b").status) == (elsewhere, MemberStatus.ALIVE)


def test_a_process_that_joins_through_its_own_namesake_gives_up() -> None:
    a = gossip("a")
    mesh = Wire(a)
    mesh.run(2.0)
    elsewhere = Address("10.0.0.99", 7946)
    second = gossip("a", seeds=(address("a"),), generation=9, at=elsewhere, now=mesh.now)
    mesh.nodes[elsewhere] = second
    mesh.run(11.0)
    assert mesh.of_type(Fenced) == [Fenced(address("a"))]
    assert set(a.view(mesh.now).members) == {"a"}


def test_a_restart_at_another_address_is_taken_once_the_former_process_is_silent() -> None:
    a, b = gossip("a"), gossip("b", seeds=(address("a"),))
    mesh = Wire(a, b)
    mesh.run(2.0)
    elsewhere = Address("10.0.0.99", 7946)
    del mesh.nodes[address("b")]
    mesh.nodes[elsewhere] = gossip("b", seeds=(address("a"),), generation=2, at=elsewhere, now=mesh.now)
    mesh.run(8.0)
    assert (mesh.member(a, "b").address, mesh.member(a, "b").status) == (elsewhere, MemberStatus.ALIVE)
    assert not mesh.of_type(Fenced)


def test_a_later_life_elsewhere_that_others_tell_of_waits_while_the_member_is_heard() -> None:
    a, b = gossip("a"), gossip("b", seeds=(address("a"),))
    mesh = Wire(a, b)
    mesh.run(2.0)
    claim = record("b", 1, generation=5, at=Address("10.0.0.99", 7946))
    a.receive(sealed(packets.Rumour(), claim, sender="c", boot=b"c" * 16), address("c"), mesh.now)
    assert mesh.member(a, "b").generation == 1
    del mesh.nodes[address("b")]
    mesh.run(5.5)
    a.receive(sealed(packets.Rumour(), claim, sender="d"), address("d"), mesh.now)
    assert mesh.member(a, "b").generation == 5


# --- everything at once, and what fits no datagram ---


def test_who_joins_learns_of_everybody_at_once() -> None:
    names = "abcdefghijklmnopqrst"
    nodes = [gossip(name, seeds=(address("a"),)) for name in names]
    mesh = Wire(*nodes[:-1])
    mesh.run(3.0)
    last = nodes[-1]
    mesh.nodes[last._own.address] = last
    for _ in range(2):
        mesh.perform(last, last.tick(mesh.now))
    assert set(last.view(mesh.now).members) == set(names)
    assert all(m.profile == PROFILE for m in last.view(mesh.now).members.values())


@pytest.mark.parametrize("size", [300, 200_000], ids=["in a datagram", "over the link"])
def test_a_bulk_section_reaches_every_peer_and_its_last_state_stays(size: int) -> None:
    a, b, c = gossip("a"), gossip("b", seeds=(address("a"),)), gossip("c", seeds=(address("a"),))
    mesh = Wire(a, b, c)
    mesh.run(2.0)
    for fill in (b"x", b"y"):
        a.set_bulk(fill * size, mesh.now)
        mesh.run(3.0)
        assert {mesh.member(node, "a").bulk for node in (a, b, c)} == {fill * size}
    late = gossip("d", seeds=(address("b"),), now=mesh.now)
    mesh.nodes[address("d")] = late
    mesh.run(4.0)
    assert mesh.member(late, "a").bulk == b"y" * size


def test_a_bulk_section_that_no_link_carries_is_refused_and_the_former_stays() -> None:
    a = gossip("a")
    a.set_bulk(b"small", 0.0)
    with pytest.raises(ValueError, match="262145 bytes exceeds 262144"):
        a.set_bulk(bytes(wire.BULK_BYTES_MAX + 1), 0.0)
    a.tick(1.0)
    assert a.view(1.0).me.bulk == b"small"


def test_an_answer_with_two_records_of_one_member_leaves_the_greater() -> None:
    a = gossip("a")
    a.receive(sealed(packets.Rumour(), record("b", 1)), address("b"), 0.1)
    a.take_exchange("b", wire.encode_record(record("b", 9)) + wire.encode_record(record("b", 5)), 0.2)
    assert a.view(0.2).members["b"].version == 9


def test_who_joins_learns_of_the_dead_too() -> None:
    a, b = gossip("a"), gossip("b", seeds=(address("a"),))
    mesh = Wire(a, b)
    mesh.run(2.0)
    del mesh.nodes[address("b")]
    mesh.run(10.0)
    late = gossip("c", seeds=(address("a"),), now=mesh.now)
    mesh.nodes[address("c")] = late
    mesh.run(2.0)
    assert mesh.member(late, "b").status is MemberStatus.DEAD


@given(st.binary(max_size=400))
def test_arbitrary_questions_and_answers_of_an_exchange_change_nothing(data: bytes) -> None:
    a = gossip("a")
    a.tick(0.0)
    before = everything(a, 1.0)
    with contextlib.suppress(MalformedDatagram):
        a.answer_exchange(data, 0.5)
    with contextlib.suppress(MalformedDatagram):
        exchange.decode_answer(data)
        return
    assert a.take_exchange("b", data, 0.5) == []
    assert everything(a, 1.0) == before


# --- what is dropped ---


def everything(of: Gossip, now: float) -> object:
    statistics = of.statistics()
    return of.view(now), replace(statistics, rejects={}), of.next_wakeup()


@given(st.binary(max_size=1_300))
def test_arbitrary_bytes_change_nothing_but_the_count_of_rejects(data: bytes) -> None:
    a = gossip("a")
    a.tick(0.0)
    before = everything(a, 1.0)
    assert a.receive(data, NOBODY, 0.5) == []
    assert everything(a, 1.0) == before
    assert sum(a.statistics().rejects.values()) == 1


@given(st.binary(max_size=wire.PAYLOAD_BYTES_MAX))
def test_arbitrary_bytes_under_the_right_key_never_raise(payload: bytes) -> None:
    a = gossip("a")
    a.receive(DatagramSealer(KEYS, b"z" * 16).seal(payload), NOBODY, 0.5)
    a.tick(1.0)


BAD_HOT = record("c", hot=b"\xc1")
GOOD_HOT = record("d", hot=encode_load(READY))


@pytest.mark.parametrize(
    ("datagram", "reason"),
    [
        pytest.param(b"x" * 1_201, "oversized", id="oversized"),
        pytest.param(b"x" * 20, "truncated", id="truncated"),
        pytest.param(DatagramSealer(Keyring([bytes(32)]), b"b" * 16).seal(b""), "unknown key", id="another key"),
        pytest.param(sealed(packets.Rumour())[:-1] + b"\x00", "tampered", id="tampered"),
        pytest.param(DatagramSealer(KEYS, b"b" * 16).seal(b"\xc1"), "malformed", id="no message"),
        pytest.param(sealed(packets.Rumour(), GOOD_HOT, BAD_HOT), "malformed", id="a bad load after a good one"),
        pytest.param(sealed(packets.Join(1, 2, 3), record("b")), "protocol version", id="a later protocol"),
    ],
)
def test_a_dropped_datagram_is_counted_by_its_reason(datagram: bytes, reason: str) -> None:
    a = gossip("a")
    assert a.receive(datagram, NOBODY, 1.0) == []
    assert dict(a.statistics().rejects) == {reason: 1}
    assert set(a.view(1.0).members) == {"a"}


# --- who may speak ---


def strange(message: packets.Message, *records: packets.Record, boot: bytes = b"s" * 16, sender: str = "s") -> bytes:
    return sealed(message, *records, sender=sender, boot=boot)


def test_a_stranger_is_taken_at_its_word_once_it_echoes_the_cookie() -> None:
    a = gossip("a")
    opener = DatagramSealer(KEYS, b"s" * 16)
    rumour = wire.encode(packets.Packet("s", packets.Rumour(), (record("s"),)))
    [(to, asked)] = packets_of(a.receive(opener.seal(rumour), address("s"), 1.0))
    assert (to, set(a.view(1.0).members), a.statistics().strangers) == (address("s"), {"a"}, 1)
    assert isinstance(asked.message, packets.Cookie)
    echo = packets.CookieEcho(asked.message.cookie)
    a.receive(opener.seal(wire.encode(packets.Packet("s", echo, (record("s"),)))), address("s"), 1.1)
    assert set(a.view(1.1).members) == {"a", "s"}


@pytest.mark.parametrize(
    ("boot", "source"),
    [
        pytest.param(b"t" * 16, address("s"), id="another process"),
        pytest.param(b"s" * 16, address("t"), id="from another address"),
    ],
)
def test_a_cookie_is_of_use_to_nobody_else(boot: bytes, source: Address) -> None:
    a = gossip("a")
    [(_, asked)] = packets_of(a.receive(strange(packets.Rumour(), record("s")), address("s"), 1.0))
    assert isinstance(asked.message, packets.Cookie)
    echo = packets.CookieEcho(asked.message.cookie)
    assert a.receive(strange(echo, record("s"), boot=boot), source, 1.1) == []
    assert set(a.view(1.1).members) == {"a"}


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(packets.Rumour(), id="gossip"),
        pytest.param(packets.Ping(1, "a"), id="ping"),
        pytest.param(packets.PingRequest(1, "c", address("c")), id="ping request"),
        pytest.param(packets.Join(1), id="join"),
        pytest.param(packets.Digest(1, 0, ()), id="digest"),
        pytest.param(packets.Delta(5), id="delta"),
        pytest.param(packets.Ack(5, "b"), id="ack"),
        pytest.param(packets.Cookie(7), id="cookie"),
        pytest.param(packets.CookieEcho(7), id="echo of no cookie"),
        pytest.param(packets.Leave(), id="leave"),
        pytest.param(packets.Conflict(9, NOBODY), id="conflict"),
    ],
)
def test_a_recording_changes_nothing_and_its_answer_is_no_larger(message: packets.Message) -> None:
    a = gossip("a")
    a.tick(0.0)
    before = a.view(0.5), a.next_wakeup()
    nameless = isinstance(message, packets.Cookie | packets.CookieEcho)
    datagram = strange(message, *([] if nameless else [record("s")]), sender="" if nameless else "s")
    for _ in range(2):
        answers = [e for e in a.receive(datagram, address("s"), 0.5) if isinstance(e, SendDatagram)]
        assert sum(len(e.data) for e in answers) <= len(datagram)
        assert all(e.address == address("s") for e in answers)
    assert (a.view(0.5), a.next_wakeup()) == before


def test_a_datagram_meant_for_another_draws_no_answer_at_a_forged_address() -> None:
    a = gossip("a")
    victim = Address("203.0.113.1", 53)
    stolen = sealed(packets.Join(7), record("b"))
    answers = [e for e in a.receive(stolen, victim, 1.0) if isinstance(e, SendDatagram)]
    assert sum(len(e.data) for e in answers) <= len(stolen)
    assert set(a.view(1.0).members) == {"a"}


def test_a_seed_given_by_name_is_joined_by_its_first_call() -> None:
    by_name = Address("seed.example", 7946)
    a, b = gossip("a"), gossip("b", seeds=(by_name,))
    mesh = Wire(a)
    mesh.nodes[address("b")] = b
    [call] = [e for e in b.tick(0.0) if isinstance(e, SendDatagram)]
    b.seed_found(by_name, address("a"))
    mesh.perform(b, [SendDatagram(address("a"), call.data)])
    assert set(b.view(0.0).members) == {"a", "b"} == set(a.view(0.0).members)


def test_the_dead_are_forgotten_although_nodes_forget_at_different_times() -> None:
    a, b, c = gossip("a"), gossip("b", seeds=(address("a"),)), gossip("c", seeds=(address("a"),))
    mesh = Wire(a, b, c)
    mesh.run(2.0)
    del mesh.nodes[address("c")]
    mesh.run(20.0)
    for turn in range(300):  # of ten minutes: longer than two tombstones last, one after the other
        now = mesh.now + turn * 600.0
        for one, other in ((a, b), (b, a)):
            one._table.forget(now - GossipConfig().tombstone_s + 40_000.0 * (one is a))
            question = exchange.encode_question(one._table)
            one.take_exchange(other.node_id, other.answer_exchange(question, now), now)
    assert "c" not in a._table.members
    assert "c" not in b._table.members


def test_the_dead_are_called_no_sooner_because_many_have_left() -> None:
    a = gossip("a")
    left = [record(f"l{i}", status=MemberStatus.LEFT) for i in range(60)]
    for start in range(0, 60, 15):
        a._take([a._table.plan(r) for r in left[start : start + 15]], "b", 0.0)
    a._take([a._table.plan(record("d", status=MemberStatus.DEAD))], "b", 0.0)
    calls = 0
    now = 0.0
    while now < 60.0:
        now = max(now, a.next_wakeup())
        calls += sum(isinstance(p.message, packets.Join) for _, p in packets_of(a.tick(now), boot=b"reader".ljust(16)))
    assert 6 <= calls <= 31


@pytest.mark.parametrize(("generation", "version"), [(wire.GENERATION_MAX, 5), (1, wire.VERSION_MAX)])
def test_a_claim_that_cannot_be_outdone_does_not_silence_the_node(generation: int, version: int) -> None:
    a = gossip("a")
    a.tick(0.0)
    claim = record("a", version, generation=generation, status=MemberStatus.DEAD)
    a.receive(sealed(packets.Rumour(), record("b"), claim), address("b"), 0.5)
    a.tick(1.0)
    own = a._own.record(with_warm=False, with_bulk=False)
    assert wire.decode(wire.encode(packets.Packet("a", packets.Rumour(), (own,)))).records == (own,)


def test_two_nodes_that_never_met_do_so_by_one_ping() -> None:
    a, b = gossip("a"), gossip("b", at=address("b"))
    mesh = Wire(a, b)
    third = sealed(packets.Rumour(), record("b", at=address("b")), sender="c", boot=b"c" * 16)
    mesh.perform(a, a.receive(third, address("c"), mesh.now))
    mesh.run(1.5)
    assert mesh.member(b, "a").status is mesh.member(a, "b").status is MemberStatus.ALIVE


def test_a_peer_that_floods_is_held_to_its_pace_and_counted() -> None:
    a = gossip("a")
    opener = DatagramSealer(KEYS, b"b" * 16)
    rumours = [opener.seal(wire.encode(packets.Packet("b", packets.Rumour(), (record("b", i),)))) for i in range(600)]
    for rumour in rumours:
        a.receive(rumour, address("b"), 1.0)
    assert a.statistics().rejects == {"flood": 600 - PEER_BURST}
    assert a.view(1.0).members["b"].version == PEER_BURST - 1
    a.receive(sealed(packets.Rumour(), record("c"), sender="c", boot=b"c" * 16), address("c"), 1.0)
    assert "c" in a.view(1.0).members


def test_replayed_and_reflected_datagrams_change_nothing() -> None:
    a = gossip("a", seeds=(NOBODY,))
    [own] = [e for e in a.tick(0.0) if isinstance(e, SendDatagram)]
    datagram = sealed(packets.Rumour(), record("b"))
    a.receive(datagram, address("b"), 0.1)
    before = everything(a, 1.0)
    assert a.receive(datagram, address("b"), 0.2) == a.receive(own.data, NOBODY, 0.2) == []
    assert everything(a, 1.0) == before
    assert dict(a.statistics().rejects) == {"replayed": 1, "reflected": 1}


# --- stalls, views, limits ---


def test_after_a_stall_the_node_blames_itself_and_nobody_else() -> None:
    a, b = gossip("a"), gossip("b", seeds=(address("a"),))
    mesh = Wire(a, b)
    mesh.run(3.0)
    effects = a.tick(mesh.now + 8.0)
    assert not [e for e in effects if isinstance(e, MemberChanged)]
    assert a.view(mesh.now + 8.0).members["b"].status is MemberStatus.ALIVE
    assert (a.statistics().stalls, a.statistics().awareness) == (1, 1)
    assert a.view(mesh.now + 8.0).members["b"].load_age_s >= 8.0


def test_a_long_time_before_the_first_tick_is_no_stall() -> None:
    a = gossip("a")
    a.tick(60.0)
    assert a.statistics().stalls == 0


def test_a_view_is_kept_until_something_changes() -> None:
    a = gossip("a")
    a.tick(0.0)
    first = a.view(0.5)
    assert a.view(0.5) is a.view(0.52) is first
    assert a.view(0.6) is not first
    former = a.view(0.6)
    a.receive(sealed(packets.Rumour(), record("b")), address("b"), 0.6)
    assert set(a.view(0.6).members) == {"a", "b"}
    assert set(former.members) == {"a"}


def test_no_more_packets_leave_than_the_budget_has() -> None:
    config = GossipConfig()
    a = gossip("a")
    opener = DatagramSealer(KEYS, b"b" * 16)
    asked = 200
    pings = [opener.seal(wire.encode(packets.Packet("b", packets.Ping(i, "a")))) for i in range(asked)]
    sent = sum(len(a.receive(ping, address("b"), 1.0)) for ping in pings)
    assert sent == config.packet_burst
    assert a.statistics().packets_withheld == asked - sent


def test_news_that_nobody_is_left_to_hear_cost_no_wakeups() -> None:
    a, b, c = gossip("a"), gossip("b", seeds=(address("a"),)), gossip("c", seeds=(address("a"),))
    mesh = Wire(a, b, c)
    mesh.run(3.0)
    del mesh.nodes[address("b")], mesh.nodes[address("c")]
    mesh.run(10.0)
    ticks = 0
    while mesh.now < 23.0:
        mesh.now = max(mesh.now, a.next_wakeup())
        mesh.perform(a, a.tick(mesh.now))
        ticks += 1
    assert ticks <= 40


def test_a_datagram_with_two_records_of_one_member_leaves_the_greater() -> None:
    for versions in ((3, 4), (4, 3)):
        a = gossip("a")
        a.receive(sealed(packets.Rumour(), *[record("c", v) for v in versions]), address("b"), 1.0)
        assert a.view(1.0).members["c"].version == 4


# --- what operators ask ---


def test_a_forgotten_member_is_gone_everywhere_and_called_no_more() -> None:
    a, b, c = gossip("a"), gossip("b", seeds=(address("a"),)), gossip("c", seeds=(address("a"),))
    mesh = Wire(a, b, c)
    mesh.run(3.0)
    assert not a.forget("c", mesh.now), "it is alive"
    assert not a.forget("nobody", mesh.now)
    del mesh.nodes[address("c")]
    mesh.run(15.0)
    assert mesh.member(a, "c").status is mesh.member(b, "c").status is MemberStatus.DEAD
    assert a.forget("c", mesh.now)
    assert not a.forget("c", mesh.now), "it has left by now"
    mesh.run(1.0)
    assert mesh.member(a, "c").status is mesh.member(b, "c").status is MemberStatus.LEFT
    before = len(mesh.effects)
    mesh.run(60.0)
    assert [e for _, e in mesh.effects[before:] if isinstance(e, SendDatagram) and e.address == address("c")] == []


def test_a_forgotten_member_that_comes_back_is_a_member() -> None:
    a, b = gossip("a"), gossip("b", seeds=(address("a"),))
    mesh = Wire(a, b)
    mesh.run(3.0)
    del mesh.nodes[address("b")]
    mesh.run(15.0)
    assert a.forget("b", mesh.now)
    again = gossip("b", seeds=(address("a"),), generation=2, now=mesh.now)
    mesh.nodes[address("b")] = again
    mesh.run(3.0)
    assert mesh.member(a, "b").status is MemberStatus.ALIVE


def test_a_seed_added_while_running_joins_two_meshes() -> None:
    a, b = gossip("a"), gossip("b")
    mesh = Wire(a, b)
    mesh.run(3.0)
    assert "b" not in a.view(mesh.now).members
    a.add_seed(address("b"), mesh.now)
    assert a.next_wakeup() <= mesh.now
    mesh.run(1.0)
    assert mesh.member(a, "b").status is mesh.member(b, "a").status is MemberStatus.ALIVE


def test_seeds_added_are_bounded_and_spare_the_configured_ones() -> None:
    a = gossip("a", seeds=(NOBODY,))
    for index in range(SEEDS_ADDED_MAX + 5):
        a.add_seed(Address("10.8.0.1", 1 + index), 0.0)
        a.add_seed(Address("10.8.0.1", 1 + index), 0.0)  # known already
    a.add_seed(a._own.address, 0.0)
    mesh = Wire(a)
    mesh.run(0.5)
    called = {e.address for e in mesh.of_type(SendDatagram) if isinstance(e, SendDatagram)}
    assert called == {NOBODY, *(Address("10.8.0.1", 6 + index) for index in range(SEEDS_ADDED_MAX))}
