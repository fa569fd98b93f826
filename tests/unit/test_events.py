"""What has happened in the mesh, as a ring that readers follow."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.view import Address, ClusterView, MemberStatus, MemberView, ModelInfo, NodeLoad, NodeProfile, Readiness
from nodes.events import COALESCE_S, EVENTS_MAX, EventLog, Happening, ViewWatch

LOST = Happening("failover", "b", "link", "a")
JOINED = Happening("joined", "c")


def member(
    node_id: str,
    status: MemberStatus = MemberStatus.ALIVE,
    *,
    readiness: str = "ready",
    lag: float = 0.0,
    models: Sequence[str] = (),
    load_age_s: float = 0.0,
) -> MemberView:
    return MemberView(
        node_id=node_id,
        address=Address("127.0.0.1", 1),
        status=status,
        generation=1,
        version=1,
        load=NodeLoad(readiness=Readiness(readiness), loop_lag_s=lag),
        profile=NodeProfile("127.0.0.1:8080", "0.1", tuple(ModelInfo(name, "f", 1024, 8) for name in models)),
        age_s=0.0,
        is_self=node_id == "a",
        load_age_s=load_age_s,
    )


def view(*members: MemberView, witnessed: frozenset[str] = frozenset()) -> ClusterView:
    everyone = {one.node_id: one for one in (member("a"), *members)}
    return ClusterView("a", 0.0, MappingProxyType(everyone), witnessed=witnessed)


def told(before: ClusterView, after: ClusterView) -> list[Happening]:
    watch = ViewWatch()
    assert watch.observe(before) == []
    return watch.observe(after)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (None, member("b", readiness="loading"), [Happening("joined", "b", "loading")]),
        (None, member("b", MemberStatus.DEAD), []),
        (member("b"), None, [Happening("forgotten", "b")]),
        (member("b"), member("b", MemberStatus.SUSPECT), [Happening("suspect", "b")]),
        (member("b"), member("b", MemberStatus.DEAD), [Happening("dead", "b")]),
        (member("b"), member("b", MemberStatus.LEFT), [Happening("left", "b")]),
        (member("b", MemberStatus.SUSPECT), member("b"), [Happening("back", "b", "suspect")]),
        (
            member("b", MemberStatus.DEAD),
            member("b", readiness="loading"),
            [Happening("back", "b", "dead"), Happening("readiness", "b", "loading")],
        ),
        (member("b", readiness="loading"), member("b"), [Happening("readiness", "b", "ready")]),
        (member("b"), member("b", readiness="failed"), [Happening("readiness", "b", "failed")]),
        (member("b"), member("b", models=["demo"]), [Happening("model", "b", "demo")]),
        (member("b", models=["demo"]), member("b"), []),
        (member("b"), member("b", lag=0.3), [Happening("degraded", "b", "its event loop lags")]),
        (member("b", lag=0.3), member("b"), [Happening("healthy", "b", "its event loop lags")]),
        (member("b"), member("b", load_age_s=9.0), [Happening("degraded", "b", "its load is old")]),
        (member("b"), member("b"), []),
        (member("b", MemberStatus.DEAD), member("b", MemberStatus.LEFT), [Happening("left", "b")]),
    ],
)
def test_what_two_pictures_of_a_member_tell(
    before: MemberView | None, after: MemberView | None, expected: list[Happening]
) -> None:
    assert told(view(*filter(None, [before])), view(*filter(None, [after]))) == expected


def test_a_node_whose_streams_make_no_progress_is_degraded_and_later_healthy() -> None:
    hung = view(member("b"), witnessed=frozenset("b"))
    assert told(view(member("b")), hung) == [Happening("degraded", "b", "streams there make no progress")]
    assert told(hung, view(member("b"))) == [Happening("healthy", "b", "streams there make no progress")]


def test_a_thousand_equal_events_close_together_are_one_with_a_count() -> None:
    log = EventLog()
    for index in range(1_000):
        log.add(LOST, 100.0 + index / 1_000)
    log.add(JOINED, 101.0)
    assert [(event.happening, event.count) for event in log.since(0)] == [(LOST, 1_000), (JOINED, 1)]
    log.add(LOST, 101.5 + COALESCE_S)
    assert [(event.number, event.count) for event in log.since(0)] == [(1, 1_000), (2, 1), (3, 1)]


def test_a_reader_gets_what_changed_since_its_revision_and_the_grown_event_again() -> None:
    log = EventLog()
    log.add(LOST, 1.0)
    log.add(JOINED, 1.0)
    revision = log.revision
    assert log.since(revision) == []
    log.add(LOST, 2.0)
    (grown,) = log.since(revision)
    assert (grown.number, grown.count, grown.happening, grown.at) == (1, 2, LOST, 2.0)


def test_a_clock_that_was_set_back_joins_nothing_of_long_ago() -> None:
    log = EventLog()
    log.add(LOST, 1_000.0)
    log.add(LOST, 10.0)
    assert [event.count for event in log.since(0)] == [1, 1]


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(0, 100)), max_size=80), st.integers(1, 6))
def test_the_ring_is_bounded_and_every_reader_sees_revisions_grow(added: list[tuple[str, float]], size: int) -> None:
    log = EventLog(size)
    seen: list[int] = []
    for node_id, at in added:
        log.add(Happening("joined", node_id), at)
        new = log.since(seen[-1] if seen else 0)
        assert len(new) == 1  # who reads after each addition misses none
        seen += [event.revision for event in new]
        assert len(log.since(0)) <= size
        assert len(log._latest) <= size
    assert seen == sorted(set(seen))
    assert sum(event.count for event in log.since(0)) <= len(added)
    revisions = [event.revision for event in log.since(0)]
    assert revisions == sorted(revisions)


def test_the_ring_keeps_the_latest() -> None:
    log = EventLog()
    for index in range(EVENTS_MAX + 10):
        log.add(Happening("joined", f"n{index}"), float(index))
    kept = log.since(0)
    assert len(kept) == EVENTS_MAX
    assert kept[-1].happening.node_id == f"n{EVENTS_MAX + 9}"
    assert kept[0].happening.node_id == "n10"
