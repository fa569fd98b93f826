"""The limiter by tables, and what it keeps to over many nodes that hear of each other late, on a virtual clock."""

from __future__ import annotations

import pytest

from mesh.counters import WINDOW_S, PeerCounters
from mesh.counters_wire import Report, Totals, Usage
from mesh.own_counters import TRANSIT_S, OwnCounters
from mesh.view import Address, ClusterView, MemberStatus, MemberView, NodeLoad, NodeProfile
from nodes.access.limits import Limiter, Limits, LostNodes, Refusal, Shares
from tests.simulation.limits.world import World

KEY = "k"


class Node:
    def __init__(self, live: int = 1, lost: tuple[str, ...] = ()) -> None:
        self.own, self.peers = OwnCounters(1), PeerCounters()
        self.shares = Shares(live, lost)
        self.limiter = Limiter(self.own, self.peers, lambda now: self.shares)

    def check(self, limits: Limits, tokens: int = 0, now: float = 0.0) -> Refusal | None:
        return self.limiter.check(KEY, limits, tokens, now)

    def begin(self, count: int, tokens: int = 0, now: float = 0.0) -> None:
        for _ in range(count):
            self.own.begin(KEY, tokens, now)

    def tell(self, now: float) -> None:
        assert self.own.section(now)

    def hear(self, node_id: str, requests: int, tokens: int = 0, running: int = 0, now: float = 0.0) -> None:
        totals = Totals(requests, tokens, 0)
        report = Report(KEY, totals, running, 0, requests, tokens)
        self.peers.merge(node_id, Usage(1, 1, (report,)), now)


def test_one_node_alone_uses_a_limit_to_its_end_at_once() -> None:
    node = Node()
    for _ in range(10):
        assert node.check(Limits(10)) is None
        node.begin(1)
    refusal = node.check(Limits(10), now=20.0)
    assert refusal is not None
    assert (refusal.kind, refusal.limit, refusal.is_brief) == ("requests", 10, False)
    assert refusal.retry_after_s == pytest.approx(WINDOW_S - 20.0, abs=0.25)
    assert node.check(Limits(10), now=WINDOW_S + 0.25) is None


def test_a_node_takes_its_share_of_what_is_left_until_the_others_have_heard() -> None:
    node = Node(live=4)
    node.begin(25)
    refusal = node.check(Limits(100))
    assert refusal is not None
    assert refusal.is_brief
    node.tell(1.0)
    assert node.check(Limits(100), now=1.0) is not None
    assert node.check(Limits(100), now=1.01 + TRANSIT_S) is None


def test_one_request_is_let_in_however_many_nodes_there_are() -> None:
    node = Node(live=64)
    assert node.check(Limits(1)) is None
    node.begin(1)
    assert node.check(Limits(2)) is not None  # the others may have taken the other one
    node.tell(1.0)
    assert node.check(Limits(2), now=2.0) is None


def test_what_others_used_counts() -> None:
    node = Node(live=2)
    node.hear("b", 9)
    assert node.check(Limits(10)) is None
    node.hear("c", 1)
    refusal = node.check(Limits(10))
    assert refusal is not None
    assert not refusal.is_brief


def test_tokens_count_from_their_reservation_and_as_they_are_used() -> None:
    node = Node()
    limits = Limits(tokens_per_minute=100)
    assert node.check(limits, 100) is None
    refusal = node.check(limits, 101)
    assert refusal is not None
    assert refusal.retry_after_s is None  # never fits
    node.begin(1, tokens=80)
    assert node.check(limits, 20) is None
    assert node.check(limits, 21) is not None
    node.own.count(KEY, 5, 5, 1.0)
    node.own.end(KEY, 80)
    assert node.check(limits, 90, now=1.0) is None
    assert node.check(limits, 91, now=1.0) is not None


def test_requests_at_once_are_counted_over_all_nodes() -> None:
    node = Node(live=2)
    limits = Limits(concurrency=3)
    node.hear("b", 2, running=2)
    assert node.check(limits) is None
    node.begin(1)
    refusal = node.check(limits)
    assert refusal is not None
    assert (refusal.kind, refusal.is_brief) == ("concurrency", True)
    node.own.end(KEY, 0)
    node.tell(0.0)
    assert node.check(limits, now=1.0) is None


def test_only_what_others_run_may_be_over_already_and_is_waited_for() -> None:
    node = Node(live=2)
    limits = Limits(concurrency=1)
    node.hear("b", 1, running=1)
    refusal = node.check(limits)
    assert refusal is not None
    assert refusal.is_brief
    busy = Node(live=2)
    busy.begin(1)
    refusal = busy.check(limits)
    assert refusal is not None
    assert not refusal.is_brief


def test_sections_that_say_something_are_counted() -> None:
    node = Node()
    assert node.own.section(0.0) == b""
    assert node.own.sections_told == 0
    node.begin(1)
    node.tell(1.0)
    assert node.own.sections_told == 1


def test_remaining_is_what_headers_say() -> None:
    node = Node(live=2)
    node.hear("b", 2, tokens=30)
    node.begin(1, tokens=20, now=10.0)
    left = node.limiter.remaining(KEY, Limits(10, 100), 10.0)
    assert (left["requests"].remaining, left["tokens"].remaining) == (7, 50)
    assert left["requests"].reset_s == pytest.approx(WINDOW_S, abs=0.3)
    assert node.limiter.remaining(KEY, Limits(), 10.0) == {}


def member(node_id: str, status: MemberStatus) -> MemberView:
    return MemberView(
        node_id, Address("127.0.0.1", 1), status, 1, 1, NodeLoad(), NodeProfile(), 0.0, is_self=node_id == "a"
    )


def view(**statuses: MemberStatus) -> ClusterView:
    return ClusterView("a", 0.0, {name: member(name, status) for name, status in statuses.items()})


def test_a_lost_node_keeps_its_share_from_its_suspicion_for_a_time_and_one_that_left_does_not() -> None:
    lost = LostNodes(600.0)
    alive, dead, left = MemberStatus.ALIVE, MemberStatus.DEAD, MemberStatus.LEFT
    assert lost.shares(view(a=alive, b=MemberStatus.SUSPECT), 0.0) == Shares(1, ("b",))
    assert lost.shares(view(a=alive, b=alive), 1.0) == Shares(2, ())  # it refuted the suspicion
    now = view(a=alive, b=dead, c=left)
    assert lost.shares(now, 10.0) == Shares(1, ("b",))
    assert lost.shares(now, 609.9) == Shares(1, ("b",))
    assert lost.shares(now, 610.0) == Shares(1, ())
    assert lost.shares(view(a=alive, b=alive), 611.0) == Shares(2, ())
    assert lost.shares(view(a=alive, b=dead), 700.0) == Shares(1, ("b",))  # lost anew
    assert lost.shares(view(a=alive, b=left), 701.0) == Shares(1, ())  # forgotten by an operator


@pytest.mark.parametrize(
    ("shares", "limit", "expected"),
    [(Shares(2, ("x", "y")), 600, 300), (Shares(3, ("x",)), 10, 7), (Shares(1, ("x", "y")), 1, 1), (Shares(5), 3, 3)],
)
def test_live_nodes_have_their_part_of_a_limit_and_never_nothing(shares: Shares, limit: int, expected: int) -> None:
    assert shares.of(limit) == expected


@pytest.mark.parametrize("nodes", [1, 2, 4, 8])
@pytest.mark.parametrize("loss", [0.0, 0.1])
def test_no_minute_admits_more_than_the_limit_and_one_a_node_and_hardly_less(nodes: int, loss: float) -> None:
    """Hammered at ten times the limit. What datagrams lose is told again a publication later, at the cost of some."""
    limit = 300
    world = World(nodes, Limits(limit), seed=nodes, loss=loss)
    world.hammer(10 * limit / 60, until=240.0)
    world.run(240.0)
    most, _ = world.most_in_a_window()
    assert most <= limit + nodes * (1 + (loss > 0))
    admitted, _ = world.count(60.0, 240.0)
    assert admitted >= 3 * limit * 0.97


def test_tokens_are_kept_to_the_limit_as_well() -> None:
    world = World(4, Limits(tokens_per_minute=6_000), seed=5)
    world.hammer(20.0, until=240.0, tokens=50, running_s=0.5)
    world.run(240.0)
    _, most = world.most_in_a_window()
    assert most <= 6_000 + 4 * 50
    _, used = world.count(60.0, 240.0)
    assert used >= 3 * 6_000 * 0.95


def test_no_double_burst_at_a_minutes_edge() -> None:
    world = World(4, Limits(100), seed=1)
    for at in (59.0, 61.0):
        world.run(at)
        for _ in range(100):
            world.ask(world.nodes[0])
            world.run(world.now + 0.02)
    assert world.most_in_a_window()[0] <= 104


def test_in_a_partition_each_side_keeps_to_its_part_and_together_to_little_more() -> None:
    limit = 300
    world = World(4, Limits(limit), seed=3)
    world.hammer(50.0, until=400.0)
    world.run(120.0)
    world.cut([0, 1], [2, 3])
    world.run(300.0)
    world.heal()
    world.run(400.0)
    assert world.most_in_a_window()[0] <= limit * 1.1
    sides = [sum(use.node in names for use in world.admitted if 200.0 <= use.at < 260.0) for names in SIDES]
    assert all(limit / 2 * 0.95 <= side <= limit / 2 + 2 for side in sides)


@pytest.mark.parametrize("factor", [10, 20, 28])
def test_a_cut_in_the_moment_in_which_nothing_was_used_adds_nothing_up_to_30_times_the_limit(factor: int) -> None:
    limit = 600
    world = World(4, Limits(limit), seed=factor)
    world.cut([0, 1], [2, 3])
    world.hammer(factor * limit / 60, until=130.0)
    world.run(130.0)
    assert world.most_in_a_window()[0] <= limit * 1.02


def test_beyond_it_each_side_admits_what_is_asked_before_the_cut_is_noticed_and_never_more_than_the_limit() -> None:
    limit = 600
    world = World(4, Limits(limit), seed=1)
    world.cut([0, 1], [2, 3])
    world.hammer(45 * limit / 60, until=60.0)
    world.run(60.0)
    assert limit * 1.1 < world.most_in_a_window()[0] <= 2 * limit


SIDES = (("node-0", "node-1"), ("node-2", "node-3"))


def test_uses_are_of_the_limits_that_a_key_has_over_all_nodes() -> None:
    node = Node(live=2)
    node.begin(2, tokens=30)
    node.hear("other", requests=3, tokens=40, running=1)
    assert node.limiter.uses(KEY, Limits(10, 500), 0.0) == {"requests": (10, 5), "tokens": (500, 100)}
    assert node.limiter.uses(KEY, Limits(concurrency=4), 0.0) == {"concurrency": (4, 3)}
    assert node.limiter.uses(KEY, Limits(), 0.0) == {}
