"""Who fails an answer is left out for a while, longer each time, and not beyond the life that failed."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from mesh.view import Address, ClusterView, MemberStatus, MemberView, NodeLoad, NodeProfile, Readiness
from nodes.exclusions import Exclusions

MEMBER = MemberView(
    "b", Address("127.0.0.1", 1), MemberStatus.ALIVE, 3, 1, NodeLoad(Readiness.READY), NodeProfile(), 0.0
)


def view(*members: MemberView) -> ClusterView:
    return ClusterView("a", 0.0, MappingProxyType({member.node_id: member for member in members}))


def left_out_until(exclusions: Exclusions, now: float) -> float:
    """To a tenth of a second."""
    return next(now + tenths / 10 for tenths in range(1_000) if not exclusions.ids(view(MEMBER), now + tenths / 10))


def test_each_failure_doubles_the_time() -> None:
    exclusions = Exclusions()
    lengths = []
    now = 100.0
    for _ in range(3):
        exclusions.add(MEMBER, 2.0, now)
        until = left_out_until(exclusions, now)
        lengths.append(round(until - now, 1))
        now = until
    assert lengths == [2.0, 4.0, 8.0]


def test_a_new_life_begins_with_a_clean_sheet() -> None:
    exclusions = Exclusions()
    exclusions.add(MEMBER, 2.0, 0.0)
    reborn = replace(MEMBER, generation=4)
    assert exclusions.ids(view(MEMBER), 1.0) == {"b"}
    assert exclusions.ids(view(reborn), 1.0) == frozenset()
    exclusions.add(reborn, 2.0, 1.0)
    assert exclusions.ids(view(reborn), 2.9) == {"b"}
    assert exclusions.ids(view(reborn), 3.0) == frozenset()


def test_who_is_no_member_is_not_named() -> None:
    exclusions = Exclusions()
    exclusions.add(MEMBER, 2.0, 0.0)
    assert exclusions.ids(view(), 1.0) == frozenset()
