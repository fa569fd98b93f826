"""Signs of life: a version without its load, which is believed only by who holds that load."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.anti_entropy import compare
from mesh.member import Member, own_member, sign_record
from mesh.membership import MemberTable
from mesh.packets import Digest, Record
from mesh.signs import Sign, long_hash
from mesh.state import encode_load
from mesh.view import Address, MemberStatus, NodeLoad, Readiness
from mesh.wire import HASH_MAX

ALIVE, SUSPECT, DEAD, LEFT = MemberStatus
THERE = Address("10.0.0.2", 7946)
B = long_hash("b")


def hot(load: int) -> bytes:
    return encode_load(NodeLoad(Readiness.READY, active_requests=load))


def record(version: int, load: int | None, status: MemberStatus = ALIVE, generation: int = 1) -> Record:
    return Record("b", generation, version, status, THERE, hot=None if load is None else hot(load))


def sign(version: int, since: int, generation: int = 1) -> Sign:
    return Sign(B, generation, version, version - since)


def table(*news: Record | Sign) -> MemberTable:
    made = MemberTable(own_member("own", 1, Address("10.0.0.1", 7946), b"", 0.0))
    for now, item in enumerate(news):
        take(made, item, float(now))
    return made


def take(into: MemberTable, item: Record | Sign, now: float) -> None:
    """As Gossip does."""
    if isinstance(item, Record):
        plan = into.plan(item)
        if plan is not None:
            into.apply(plan, now, told_by="teller")
        return
    member = into.news_in(item)
    if member is not None:
        plan = into.plan(sign_record(member, item))
        if plan is not None:
            into.apply(plan, now, told_by="teller")
        member.know_unchanged(item)


def known(*news: Record | Sign) -> Member:
    return table(*news).members["b"]


def test_who_holds_the_load_has_it_of_the_newer_version_and_passes_the_sign_on() -> None:
    member = known(record(3, 7), sign(9, 2))
    assert (member.version, member.load_version, member.load.active_requests) == (9, 9, 7)
    assert (member.advanced_at, member.load_at) == (1.0, 1.0)
    assert member.encoded_sign() != b""
    assert not member.lacks_load


def test_who_holds_an_older_load_takes_the_version_without_it_and_asks_for_it() -> None:
    made = table(record(3, 7), sign(9, 4))
    member = made.members["b"]
    assert (member.version, member.load_version, member.load.active_requests) == (9, 3, 7)
    assert member.lacks_load
    holder = table(record(9, 8))
    asked = Digest(0, HASH_MAX, (member.asking_entry(),))
    assert [lacking.member.node_id for lacking in compare(holder, asked, "own", 3).lacking] == ["b"]
    take(made, record(9, 8), 2.0)
    assert (member.load_version, member.load.active_requests, member.lacks_load) == (9, 8, False)


def test_a_load_that_changed_and_changed_back_is_not_taken_for_unchanged() -> None:
    member = known(record(1, 7), record(9, 7))
    assert member.encoded_sign() == b""  # others may hold what was published in between
    assert known(record(1, 7), sign(9, 5)).load_version == 1


def test_a_load_that_comes_after_its_sign_is_of_the_newer_version() -> None:
    member = known(record(1, 7), sign(9, 4), record(5, 8))
    assert (member.version, member.load_version, member.load.active_requests) == (9, 9, 8)
    assert not member.lacks_load


def test_the_owner_says_since_when_beside_its_record() -> None:
    member = known(record(9, 7), sign(9, 4))
    assert member.encoded_sign() != b""
    assert member.hot_since == 4


@pytest.mark.parametrize("status", [SUSPECT, DEAD, LEFT])
def test_a_newer_sign_refutes_what_is_said_of_an_older_version(status: MemberStatus) -> None:
    assert known(record(3, 7), record(3, None, status), sign(4, 3)).status is ALIVE
    assert known(record(3, 7), record(3, None, status), sign(3, 2)).status is status
    assert known(record(3, 7), record(3, None, status)).encoded_sign() == b""


@pytest.mark.parametrize(
    "stray",
    [sign(9, 2, generation=2), sign(9, 2, generation=0), sign(2, 1), Sign(long_hash("stranger"), 1, 9, 7)],
    ids=["of another life", "of a former life", "older", "of a stranger"],
)
def test_a_sign_that_is_of_no_use_changes_nothing(stray: Sign) -> None:
    made = table(record(3, 7), stray)
    assert list(made.members) == ["own", "b"]
    member = made.members["b"]
    assert (member.generation, member.version, member.load_version, member.advanced_at) == (1, 3, 3, 0.0)


def test_a_sign_of_this_very_node_changes_nothing() -> None:
    made = table(Sign(long_hash("own"), 1, 9, 0))
    assert made.own.version == 0


def test_another_life_knows_nothing_of_the_former_ones_load() -> None:
    member = known(record(3, 7), sign(9, 3), record(2, None, generation=2), sign(4, 1, generation=2))
    assert (member.generation, member.version, member.load_version, member.load.active_requests) == (2, 4, 0, 0)
    assert member.lacks_load


histories = st.lists(st.integers(0, 2), min_size=1, max_size=8)  # the load at each version, from 1 on


@given(histories, st.data())
def test_in_whatever_order_news_come_no_load_is_held_for_that_of_another_version(
    loads: list[int], data: st.DataObject
) -> None:
    since = [1]
    for before, after in pairwise(loads):
        since.append(since[-1] if before == after else len(since) + 1)
    versions = range(1, len(loads) + 1)
    facts: list[Record | Sign] = [record(v, loads[v - 1]) for v in versions]
    facts += [record(v, None) for v in versions] + [sign(v, since[v - 1]) for v in versions]
    told = data.draw(st.lists(st.sampled_from(facts), max_size=12))
    made = table(*told)
    if (member := made.members.get("b")) is None:
        return
    relayed = [fact.version for fact in told if isinstance(fact, Record)]
    assert member.version >= max(relayed)
    assert member.load_version == 0 or member.load.active_requests == loads[member.load_version - 1]
    assert member.hot_since == 0 or loads[member.hot_since - 1 : member.version] == [loads[member.version - 1]] * (
        member.version - member.hot_since + 1
    )
    assert member.asking_entry().version == (0 if member.lacks_load else member.version)
