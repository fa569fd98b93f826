"""The simulator's own parts: seals, clocks, links, the network."""

from __future__ import annotations

import random

import pytest

from mesh.errors import SealRejected
from mesh.seal import DEVELOPMENT_KEY, OVERHEAD_BYTES, DatagramSealer, Keyring, Opened
from tests.simulation.beliefs import all_healthy
from tests.simulation.network import Network
from tests.simulation.scenarios.settled import acquaint, settle
from tests.simulation.shortcuts import StandInSealer
from tests.simulation.sim_node import SimNode
from tests.simulation.world import World

A, B = b"a" * 16, b"b" * 16


def sealer(kind: str, boot_id: bytes) -> DatagramSealer | StandInSealer:
    return StandInSealer(boot_id) if kind == "stand-in" else DatagramSealer(Keyring([DEVELOPMENT_KEY]), boot_id)


@pytest.mark.parametrize("kind", ["real", "stand-in"])
def test_the_stand_in_opens_and_rejects_like_the_real_seal(kind: str) -> None:
    sender, receiver = sealer(kind, A), sealer(kind, B)
    stranger = receiver.open(sender.seal(b"zero"))
    assert not stranger.is_admitted
    receiver.admit(stranger)
    first, second = sender.seal(b"one"), sender.seal(b"two")
    assert len(first) == 3 + OVERHEAD_BYTES
    assert receiver.open(second) == Opened(A, 3, b"two", is_admitted=True)
    assert receiver.open(first) == Opened(A, 2, b"one", is_admitted=True)  # overtaken, not seen before
    for data, opener, reason in [
        (first, receiver, "replayed"),
        (second, receiver, "replayed"),
        (first, sender, "reflected"),
        (first[:40], receiver, "truncated"),
        (sender.seal(b"three")[:-1] + b"\0", sealer(kind, B), "tampered"),
    ]:
        with pytest.raises(SealRejected, match=reason):
            opener.open(data)


def test_clocks_run_at_rates_of_their_own_and_began_anywhere() -> None:
    world = World(1, clock_drift=0.01)
    nodes = [world.place(f"n{i}") for i in range(8)]
    assert len({n.clock(0.0) for n in nodes}) == 8
    assert all(0.99 <= n.clock(1.0) - n.clock(0.0) <= 1.01 for n in nodes)
    assert all(n.time_of(n.clock(7.5)) == pytest.approx(7.5) for n in nodes)


def ask(world: World, asker: str, answerer: str) -> list[str]:
    """What comes of a request over the link, in the next seconds."""
    heard: list[str] = []

    def name(target: SimNode) -> str:
        heard.append("asked")
        return target.name

    node, target = world.nodes[asker], world.nodes[answerer]
    world.request(node, target.address, name, heard.append, lambda: heard.append("refused"))
    assert "asked" not in heard  # not at once
    world.run_for(1.0)
    return heard


def test_a_request_over_a_link_is_answered_after_a_while() -> None:
    world = World(1)
    settle(world, 2)
    assert ask(world, "n0", "n1") == ["asked", "n1"]


def test_a_request_over_a_link_is_refused_across_a_cut_in_either_direction() -> None:
    world = World(1)
    settle(world, 3)
    world.cut({("n0", "n1"), ("n2", "n0")})
    assert [ask(world, "n0", "n1"), ask(world, "n1", "n0"), ask(world, "n0", "n2")] == [["refused"]] * 3
    world.kill("n2")
    world.heal()
    assert ask(world, "n0", "n2") == ["refused"]


def test_a_process_that_stands_still_answers_its_links_later() -> None:
    world = World(1)
    settle(world, 2)
    world.stall("n1", 3.0)
    assert ask(world, "n0", "n1") == []
    world.run_for(3.0)
    assert ask(world, "n0", "n1") == ["asked", "n1"]


def test_a_network_loses_and_doubles_as_it_was_told() -> None:
    rng = random.Random(1)
    copies = [len(Network(loss=0.3, duplication=0.5).arrivals(rng, "a", "b")) for _ in range(2_000)]
    assert sum(copies) / 2_000 == pytest.approx(1.5 * 0.7, abs=0.05)
    assert Network(cuts={("a", "b")}).arrivals(rng, "a", "b") == []
    assert len(Network(cuts={("a", "b")}).arrivals(rng, "b", "a")) == 1


def test_those_who_begin_acquainted_take_each_other_for_no_strangers() -> None:
    world = World(1, Network(), [])
    world.add(12, seeds=(), spread_s=0.2)
    world.run_for(0.5)
    acquaint(world)
    world.run_for(3.0)
    assert all_healthy(world)
    assert sum(node.core.statistics().strangers for node in world.running) == 0
