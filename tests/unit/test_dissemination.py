"""Rumours by recency within a packet, and the budget of packets."""

from __future__ import annotations

from mesh.dissemination import SCANNED_MAX, PacketBudget, Rumours
from mesh.member import own_member
from mesh.membership import MemberTable
from mesh.packets import Record
from mesh.signs import Sign, encode_sign, long_hash
from mesh.state import encode_load, encode_profile
from mesh.view import Address, MemberStatus, NodeLoad, NodeProfile

THERE = Address("10.0.0.2", 7946)
HOT = encode_load(NodeLoad())
WARM = encode_profile(NodeProfile(version="a version that takes some room"))
PLENTY = 10_000


def table(*names: str, told_by: str = "teller") -> MemberTable:
    made = MemberTable(own_member("own", 1, Address("10.0.0.1", 7946), b"", 0.0))
    for name in names:
        plan = made.plan(Record(name, 1, 3, MemberStatus.ALIVE, THERE, 2, HOT, WARM))
        assert plan is not None
        made.apply(plan, 1.0, told_by=told_by)
    return made


def test_the_most_recent_news_are_told_first() -> None:
    made = table("b", "c", "d")
    rumours = Rumours(made, 4)
    for name in ("b", "c", "d", "b"):
        rumours.add_load(name, is_changed=True)
    room = 2 * len(made.members["b"].encoded(with_warm=False))
    told = rumours.take(room, "x").records
    assert told == [made.members[name].encoded(with_warm=False) for name in ("b", "d")]


def test_news_are_told_a_bounded_number_of_times() -> None:
    made = table("b")
    rumours = Rumours(made, 4)
    rumours.add_load("b", is_changed=True)
    assert [len(rumours.take(PLENTY, "x").records) for _ in range(6)] == [1, 1, 1, 1, 0, 0]
    assert rumours.waiting_count == 0


def test_news_do_not_go_to_whom_they_are_about_nor_back_to_their_teller() -> None:
    made = table("b")
    rumours = Rumours(made, 4)
    rumours.add_load("b", is_changed=True)
    rumours.add_urgent("b", with_warm=False)
    assert rumours.take(PLENTY, "b").records == rumours.take(PLENTY, "teller").records == []
    assert len(rumours.take(PLENTY, "x").records) == 1


def test_urgent_news_leave_room_for_loads_and_loads_for_urgent_news() -> None:
    urgent, loads = [f"u{i}" for i in range(40)], [f"l{i}" for i in range(40)]
    made = table(*urgent, *loads)
    rumours = Rumours(made, 4)
    for name in urgent:
        rumours.add_urgent(name, with_warm=False)
    for name in loads:
        rumours.add_load(name, is_changed=True)
    told = rumours.take(1_000, "x").records
    ids = {bytes(record[2:4]) for record in told}
    assert {i[:1] for i in ids} == {b"u", b"l"}
    assert sum(map(len, told)) <= 1_000


def test_loads_that_changed_go_before_signs_of_life_but_leave_them_room() -> None:
    signs, loads = [f"s{i}" for i in range(40)], [f"l{i}" for i in range(40)]
    made = table(*signs, *loads)
    rumours = Rumours(made, 4)
    for name in loads:
        rumours.add_load(name, is_changed=True)
    for name in signs:  # more recent, and yet
        rumours.add_load(name, is_changed=False)
    told = [bytes(record[2:3]) for record in rumours.take(1_000, "x").records]
    assert told.count(b"l") > 2 * told.count(b"s") > 0


def test_a_change_under_way_stays_one_when_a_newer_version_brings_the_same_load() -> None:
    made = table("b", "c")
    rumours = Rumours(made, 4)
    rumours.add_load("b", is_changed=True)
    rumours.add_load("c", is_changed=False)
    rumours.add_load("b", is_changed=False)
    assert rumours.take(PLENTY, "x").records[0] == made.members["b"].encoded(with_warm=False)
    assert rumours.waiting_count == 2


def test_a_change_under_way_is_told_a_bounded_number_of_times_whatever_newer_versions_carry_it() -> None:
    made = table("b")
    rumours = Rumours(made, 4)
    rumours.add_load("b", is_changed=True)
    tellings = 0
    for _ in range(40):
        tellings += len(rumours.take(PLENTY, "x").records)
        rumours.add_load("b", is_changed=False)
        if rumours._signs:
            break
    assert tellings == 4


def test_a_load_known_to_be_the_same_is_told_as_a_sign_of_life() -> None:
    made = table("b", "c")
    made.members["b"].know_unchanged(Sign(long_hash("b"), 1, 3, 1))
    rumours = Rumours(made, 4)
    rumours.add_load("b", is_changed=False)
    rumours.add_load("c", is_changed=False)
    taken = rumours.take(PLENTY, "x")
    assert taken.signs == [encode_sign(Sign(long_hash("b"), 1, 3, 1))]
    assert taken.records == [made.members["c"].encoded(with_warm=False)]
    assert taken.room_bytes == PLENTY - len(taken.signs[0]) - len(taken.records[0])
    assert [len(rumours.take(PLENTY, "x").signs) for _ in range(8)] == [*[1] * 7, 0]


def test_a_profile_goes_along_while_it_is_news() -> None:
    made = table("b")
    rumours = Rumours(made, 2)
    rumours.add_urgent("b", with_warm=True)
    assert rumours.take(PLENTY, "x").records == [made.members["b"].encoded(with_warm=True)]
    rumours.add_urgent("b", with_warm=False)  # later news about it do not take that back
    assert rumours.take(PLENTY, "x").records == [made.members["b"].encoded(with_warm=True)]


def test_the_own_profile_goes_along_as_often_as_any_other() -> None:
    made = table()
    rumours = Rumours(made, 2)
    made.own.warm, made.own.profile_version, made.own.warm_version = WARM, 2, 2
    rumours.add_urgent("own", with_warm=True)
    assert rumours.take(PLENTY, "x").records == []
    with_profile, without = made.own.encoded(with_warm=True), made.own.encoded(with_warm=False)
    assert [rumours.take_own() for _ in range(3)] == [with_profile, with_profile, without]


def test_only_so_many_are_looked_at_for_one_packet() -> None:
    made = table(*(f"n{i}" for i in range(300)))
    rumours = Rumours(made, 4)
    rumours.add_load("n0", is_changed=True)
    for i in range(1, 300):
        made.members[f"n{i}"].told_by = "x"
        rumours.add_load(f"n{i}", is_changed=True)
    assert rumours.take(PLENTY, "x").records == []  # n0 is behind 299 that "x" told itself
    assert len(rumours.take(PLENTY, "y").records) == SCANNED_MAX


def test_what_does_not_fit_waits_for_the_next_packet() -> None:
    made = table("b")
    rumours = Rumours(made, 4)
    rumours.add_urgent("b", with_warm=True)
    assert rumours.take(30, "x").records == []
    assert rumours.waiting_count == 1


def test_news_of_the_forgotten_are_dropped() -> None:
    made = table("b")
    rumours = Rumours(made, 4)
    rumours.add_load("gone", is_changed=True)
    assert rumours.take(PLENTY, "x").records == []
    assert rumours.waiting_count == 0


def test_news_of_the_forgotten_never_outgrow_the_members() -> None:
    made = table("b", "c")
    rumours = Rumours(made, 4)
    for i in range(100):
        rumours.add_urgent(f"forgotten{i}", with_warm=True)
        rumours.add_load(f"forgotten{i}", is_changed=True)
        rumours.add_load(f"asleep{i}", is_changed=False)
    rumours.add_urgent("b", with_warm=True)
    rumours.add_load("c", is_changed=True)
    assert rumours.waiting_count == 3 * len(made.members)
    assert len(rumours.take(PLENTY, "x").records) == 2


def test_a_budget_gives_its_burst_then_its_rate() -> None:
    budget = PacketBudget(rate=2.0, burst=5, byte_rate=1e6, now=0.0)
    assert sum(budget.take(0.0) for _ in range(9)) == 5
    assert sum(budget.take(1.0) for _ in range(9)) == 2
    assert sum(budget.take(100.0) for _ in range(9)) == 5


def test_a_reserve_is_kept_for_those_who_may_use_it() -> None:
    budget = PacketBudget(rate=2.0, burst=5, byte_rate=1e6, now=0.0)
    assert sum(budget.take(0.0, reserve=3) for _ in range(9)) == 2
    assert sum(budget.take(0.0) for _ in range(9)) == 3


def test_bytes_spent_leave_room_for_no_more_until_time_has_passed() -> None:
    budget = PacketBudget(rate=10.0, burst=10, byte_rate=1_000.0, now=0.0)
    assert budget.room_bytes(800) == 800
    budget.spend(1_200)
    assert budget.take(0.1)
    assert budget.room_bytes(800) == 0
    assert budget.take(0.5)
    assert budget.room_bytes(800) == 300
    assert budget.take(60.0)
    assert budget.room_bytes(8_000) == 1_000


def test_a_clock_that_stands_still_fills_nothing() -> None:
    budget = PacketBudget(rate=2.0, burst=1, byte_rate=1e6, now=5.0)
    assert budget.take(5.0)
    assert not budget.take(4.0)
    assert not budget.take(5.0)
