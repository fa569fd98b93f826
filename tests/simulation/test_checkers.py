"""Each checker finds the fault it is there for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from mesh.gossip import MemberChanged
from mesh.view import MemberStatus
from mesh.wire import DATAGRAM_BYTES_MAX
from tests.simulation import inside
from tests.simulation.checkers.checker import Checker
from tests.simulation.checkers.datagrams_fit import DatagramsFit
from tests.simulation.checkers.nobody_returns import NobodyReturnsWithoutANewerVersion
from tests.simulation.checkers.only_the_owner_raises import OnlyTheOwnerRaisesItsVersion
from tests.simulation.checkers.packet_budget import PacketsStayWithinTheBudget
from tests.simulation.checkers.queues_stay_bounded import QueuesStayBounded
from tests.simulation.checkers.replays_change_nothing import ReplaysChangeNothing
from tests.simulation.checkers.tables_stay_bounded import TablesStayBounded
from tests.simulation.checkers.versions_never_fall import VersionsNeverFall
from tests.simulation.checkers.views_agree import ViewsAgreeWhenNothingHappens
from tests.simulation.network import Network
from tests.simulation.scenarios.settled import settle
from tests.simulation.world import World


def row_falls(world: World, checker: Checker) -> None:
    node = world.nodes["n1"]
    checker.on_sample(world, node)
    _row(world).version -= 1
    checker.on_sample(world, node)


def row_rises(world: World, checker: Checker) -> None:
    _row(world).version += 5
    checker.on_sample(world, world.nodes["n1"])


def dead_returns(world: World, checker: Checker) -> None:
    alive = world.view("n1").members["n0"]
    checker.on_change(world, world.nodes["n1"], MemberChanged(replace(alive, status=MemberStatus.DEAD), alive))


def datagram_is_long(world: World, checker: Checker) -> None:
    checker.on_send(world, world.nodes["n1"], bytes(DATAGRAM_BYTES_MAX + 1))


def many_are_sent(world: World, checker: Checker) -> None:
    node = world.nodes["n1"]
    node.core._outbox.sent["gossip"] += world.config.packet_burst + 1
    checker.on_send(world, node, b"")


def suspicions_pile_up(world: World, checker: Checker) -> None:
    world.nodes["n1"].core._detector._expiries += [(0.0, "n0")] * 100
    checker.on_sample(world, world.nodes["n1"])


def relays_pile_up(world: World, checker: Checker) -> None:
    detector = world.nodes["n1"].core._detector
    relay = detector.relay(world.nodes["n0"].address, 1, "n2", 0.0)
    detector._relays |= dict.fromkeys(range(1000), detector._relays[relay])
    checker.on_sample(world, world.nodes["n1"])


def views_differ(world: World, checker: Checker) -> None:
    world.run_for(20.0)
    _row(world).status = MemberStatus.DEAD
    checker.on_sample(world, world.nodes["n1"])


class ForgetfulBoot:
    """Admitted, and of no datagram known that it came before."""

    def __init__(self) -> None:
        self.ciphers: dict[bytes, object] = {}

    def has_seen(self, counter: int) -> bool:
        return False

    def mark_seen(self, counter: int) -> None:
        return


class ForgetfulBoots(dict[object, object]):
    """A replay window that remembers nothing."""

    def get(self, *_: object) -> ForgetfulBoot:  # type: ignore[override]
        return ForgetfulBoot()

    def move_to_end(self, *_: object) -> None:
        return None


def replay_window_forgets(world: World, checker: Checker) -> None:
    for node in world.running:
        node.core._sealer._boots = ForgetfulBoots()  # type: ignore[assignment]
    world.run_for(5.0)


@pytest.mark.parametrize(
    ("checker", "fault"),
    [
        (VersionsNeverFall, row_falls),
        (OnlyTheOwnerRaisesItsVersion, row_rises),
        (NobodyReturnsWithoutANewerVersion, dead_returns),
        (DatagramsFit, datagram_is_long),
        (PacketsStayWithinTheBudget, many_are_sent),
        (QueuesStayBounded, suspicions_pile_up),
        (TablesStayBounded, relays_pile_up),
        (ViewsAgreeWhenNothingHappens, views_differ),
        (lambda: ReplaysChangeNothing(1), replay_window_forgets),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_checker_finds_its_fault(checker: Callable[[], Checker], fault: Callable[[World, Checker], None]) -> None:
    looking = checker()
    world = World(1, Network(), [looking])
    settle(world, 3)
    with pytest.raises(AssertionError):
        fault(world, looking)


def test_replays_are_made_and_rejected() -> None:
    checker = ReplaysChangeNothing(1)
    world = World(1, Network(), [checker])
    settle(world, 3)
    world.run_for(10.0)
    assert checker.count > 10


def _row(world: World) -> inside.Member:
    row = inside.row(world.nodes["n1"].core, "n0")
    assert row is not None
    return row
