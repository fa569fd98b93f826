"""The member table: which of two claims holds, whatever the order they come in, and what it remembers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.member import Member, id_hash, join_accusers, own_member
from mesh.membership import MEMBERS_MAX, NEWS, TOMBSTONES_MAX, Change, MemberTable, PeerCycle
from mesh.packets import Record
from mesh.state import encode_load, encode_profile
from mesh.view import Address, MemberStatus, NodeLoad, NodeProfile, Readiness

ALIVE, SUSPECT, DEAD, LEFT = MemberStatus
HERE = Address("10.0.0.1", 7946)


def table() -> MemberTable:
    return MemberTable(own_member("own", 1, HERE, b"", 0.0))


def record(
    version: int,
    status: MemberStatus = ALIVE,
    *,
    generation: int = 1,
    node_id: str = "b",
    with_hot: bool = False,
    with_warm: bool = False,
    accusers: tuple[int, ...] = (),
) -> Record:
    """What b publishes at a version: a function of (generation, version), as with a single owner."""
    warm_version = version - version % 3
    return Record(
        node_id,
        generation,
        version,
        status,
        Address(f"10.0.{generation % 250}.2", 7946),
        warm_version,
        encode_load(NodeLoad(Readiness.READY, active_requests=version)) if with_hot else None,
        encode_profile(NodeProfile(version=f"{generation}.{warm_version}")) if with_warm else None,
        accusers if status is SUSPECT else (),
    )


def merged(*records: Record) -> MemberTable:
    made = table()
    for item in records:
        merge(made, item)
    return made


def merge(into: MemberTable, item: Record, now: float = 1.0) -> int:
    plan = into.plan(item)
    if plan is None:
        return 0
    into.apply(plan, now, told_by="teller")
    return plan.change


def state(of: MemberTable) -> Sequence[object]:
    """Everything that what comes later is compared with or shown from."""
    return sorted(
        (
            m.node_id,
            m.generation,
            m.version,
            m.status,
            m.accusers,
            m.address,
            m.load_version,
            m.load.active_requests,
            m.profile_version,
            m.profile.version,
            m.warm_version,
        )
        for m in of.members.values()
    )


statuses = st.sampled_from(MemberStatus)
some_records = st.builds(
    record,
    st.integers(0, 6),
    statuses,
    generation=st.integers(1, 2),
    node_id=st.sampled_from(["b", "c"]),
    with_hot=st.booleans(),
    with_warm=st.booleans(),
    accusers=st.sets(st.integers(0, 5), max_size=3).map(lambda found: tuple(sorted(found))),
)


@given(some_records, some_records)
def test_merging_is_commutative(a: Record, b: Record) -> None:
    assert state(merged(a, b)) == state(merged(b, a))


@given(st.lists(some_records, min_size=3, max_size=3))
def test_merging_is_associative(three: list[Record]) -> None:
    assert len({str(state(merged(*order))) for order in permutations(three)}) == 1


@given(st.lists(some_records, max_size=5))
def test_merging_is_idempotent(records: list[Record]) -> None:
    once = merged(*records)
    before = state(once)
    assert [merge(once, item) for item in records] == [0] * len(records)
    assert state(once) == before


@given(st.lists(some_records, max_size=8))
def test_a_table_told_by_another_ends_up_the_same(records: list[Record]) -> None:
    teller = merged(*records)
    learner = table()
    for member in teller.members.values():
        if member is not teller.own:
            merge(learner, member.record(with_warm=True, with_bulk=True))
    claims = [(m.node_id, m.generation, m.version, m.status, m.accusers) for m in learner.members.values()]
    assert sorted(claims) == sorted(
        (m.node_id, m.generation, m.version, m.status, m.accusers) for m in teller.members.values()
    )


@given(st.lists(some_records, max_size=12))
def test_the_indexes_hold_who_is_live_and_nobody_else(records: list[Record]) -> None:
    made = merged(*records)
    others = [m for m in made.members.values() if m is not made.own]
    live = {m.node_id for m in others if m.is_live}
    assert {m.node_id for m in made.live} == live
    assert len(made.live) == len(live)
    assert {m.node_id for m in made.between(0, 2**32)} == live | {"own"}
    assert set(made.tombstones) == {m.node_id for m in others} - live


@pytest.mark.parametrize(
    ("held", "told", "change"),
    [
        pytest.param(None, record(4), Change.NEW | Change.ADVANCED, id="new"),
        pytest.param(None, record(4, DEAD), Change.NEW | Change.ADVANCED, id="new and dead"),
        pytest.param(record(4), record(4), 0, id="known"),
        pytest.param(record(4), record(3, DEAD), 0, id="older obituary"),
        pytest.param(record(4), record(5), Change.ADVANCED, id="newer"),
        pytest.param(record(4), record(4, SUSPECT), Change.STATUS, id="suspected at this version"),
        pytest.param(record(4, SUSPECT), record(4), 0, id="alive at the suspected version refutes nothing"),
        pytest.param(record(4, SUSPECT), record(5), Change.ADVANCED | Change.STATUS, id="newer version refutes"),
        pytest.param(record(4, SUSPECT), record(4, SUSPECT, accusers=(7,)), Change.ACCUSED, id="confirmed"),
        pytest.param(record(4, SUSPECT), record(5, SUSPECT), Change.ADVANCED, id="suspected anew later"),
        pytest.param(record(4, SUSPECT), record(4, DEAD), Change.STATUS, id="dead"),
        pytest.param(record(4, DEAD), record(4, SUSPECT), 0, id="dead is not less than suspect"),
        pytest.param(record(4, DEAD), record(5), Change.ADVANCED | Change.STATUS, id="returned with a newer version"),
        pytest.param(record(4, DEAD), record(4, LEFT), Change.STATUS, id="left after all"),
        pytest.param(record(4, LEFT), record(4), 0, id="no return from the same version"),
        pytest.param(
            record(9, LEFT),
            record(1, generation=2),
            Change.GENERATION | Change.ADVANCED | Change.STATUS,
            id="restarted",
        ),
        pytest.param(record(1, generation=2), record(9, LEFT), 0, id="news of a former life"),
        pytest.param(record(4), record(4, with_hot=True), Change.LOAD | Change.READINESS, id="load that was missing"),
        pytest.param(record(4, with_hot=True), record(4, with_hot=True), 0, id="load that is known"),
        pytest.param(record(4, SUSPECT), record(4, with_warm=True), Change.PROFILE, id="profile that was missing"),
    ],
)
def test_a_record_changes_exactly_this(held: Record | None, told: Record, change: int) -> None:
    made = merged(held) if held else table()
    assert merge(made, told) == change


def test_news_are_what_people_and_routers_act_on() -> None:
    assert Change.STATUS & NEWS
    assert Change.PROFILE & NEWS
    assert not Change.ADVANCED & NEWS
    assert not Change.LOAD & NEWS


def test_another_life_forgets_what_the_former_published() -> None:
    made = merged(record(6, with_hot=True, with_warm=True), record(1, generation=2))
    member = made.members["b"]
    assert member.profile == NodeProfile()
    assert member.load == NodeLoad()
    assert member.record(with_warm=True, with_bulk=False).hot is None
    assert member.record(with_warm=True, with_bulk=False).warm is None


def test_a_load_rides_only_with_the_version_it_was_published_at() -> None:
    member = merged(record(4, with_hot=True), record(5)).members["b"]
    assert member.load.active_requests == 4
    assert member.load_version == 4
    assert member.record(with_warm=False, with_bulk=False).hot is None


def test_sections_too_large_together_go_one_by_one() -> None:
    member = own_member("own", 1, HERE, b"", 0.0)
    member.hot = member.warm = bytes(600)
    assert member.record(with_warm=True, with_bulk=False).hot is None
    assert member.record(with_warm=False, with_bulk=False).hot == member.hot


@given(*[st.sets(st.integers(0, 9), max_size=3).map(lambda s: tuple(sorted(s))) for _ in range(3)])
def test_accusers_join_in_any_order(a: tuple[int, ...], b: tuple[int, ...], c: tuple[int, ...]) -> None:
    assert join_accusers(join_accusers(a, b), c) == join_accusers(a, join_accusers(c, b))
    assert len(join_accusers(a, b)) <= 3


def test_tombstones_are_forgotten_after_their_time_and_never_too_many() -> None:
    made = table()
    for index in range(TOMBSTONES_MAX + 10):
        merge(made, record(1, DEAD, node_id=f"m{index}"), now=float(index))
    assert len(made.tombstones) == TOMBSTONES_MAX
    assert "m9" not in made.members
    assert "m10" in made.members
    assert made.forget(20.0)
    assert "m19" not in made.members
    assert "m20" in made.members
    assert not made.forget(20.0)
    assert id_hash("m19") not in made.id_of_hash


def test_a_full_table_refuses_new_members_and_counts_them() -> None:
    made = table()
    for index in range(MEMBERS_MAX + 2):
        merge(made, record(1, node_id=f"m{index}"))
    assert len(made.members) == MEMBERS_MAX
    assert made.refused == 3


def test_the_stalest_is_who_advanced_longest_ago() -> None:
    made = merged(record(1), record(1, node_id="c"), record(2))
    stalest = made.stalest()
    assert stalest is not None
    assert stalest.node_id == "c"
    merge(made, record(1, DEAD, node_id="c"))
    stalest = made.stalest()
    assert stalest is not None
    assert stalest.node_id == "b"
    assert table().stalest() is None


def test_a_stall_of_this_node_is_held_against_nobody() -> None:
    made = merged(record(1, SUSPECT))
    made.postpone(3.0)
    member = made.members["b"]
    assert (member.suspected_at, member.advanced_at, member.load_at) == (4.0, 4.0, 1.0)


def test_a_sample_names_only_who_is_alive_and_was_heard() -> None:
    made = merged(record(1, SUSPECT), *[record(1, node_id=f"m{i}") for i in range(9)])
    merge(made, record(2, node_id="m3"), now=5.0)
    rng = random.Random(1)
    for _ in range(50):
        assert "b" not in names(made.sample(rng, 4, "m3"))
        assert "m3" not in names(made.sample(rng, 4, "m3"))
    assert set(names(made.sample(rng, 9, "", heard_since=4.0))) == {"m3"}
    assert table().sample(rng, 3, "") == []


def names(members: list[Member]) -> list[str]:
    return [m.node_id for m in members]


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 99))
def test_a_cycle_meets_everybody_once_a_turn(count: int, step: int, seed: int) -> None:
    made = merged(*[record(1, node_id=f"m{i}") for i in range(count)])
    cycle = PeerCycle(made, random.Random(seed))
    assert sorted(m.node_id for _ in range(count) if (m := cycle.next())) == sorted(names(made.live))
    for _ in range(5):
        taken = names(cycle.take(step))
        assert len(set(taken)) == len(taken) <= min(step, count)
        assert taken


def test_a_cycle_passes_over_who_died_and_ends_with_nobody() -> None:
    made = merged(record(1), record(1, node_id="c"))
    cycle = PeerCycle(made, random.Random(1))
    first = cycle.next()
    assert first is not None
    other = "c" if first.node_id == "b" else "b"
    merge(made, record(1, DEAD, node_id=other))
    assert cycle.next() is first
    merge(made, record(1, DEAD, node_id=first.node_id))
    assert cycle.next() is None
    assert cycle.take(3) == []
