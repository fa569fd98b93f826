"""Times that grow with the number of members."""

from __future__ import annotations

import pytest

from mesh.gossip_types import GossipConfig
from mesh.member import own_member
from mesh.membership import MemberTable
from mesh.pace import Pace
from mesh.packets import Record
from mesh.view import Address, MemberStatus

THERE = Address("10.0.0.2", 7946)


def pace(members: int) -> Pace:
    table = MemberTable(own_member("own", 1, Address("10.0.0.1", 7946), b"", 0.0))
    for i in range(members - 1):
        plan = table.plan(Record(f"n{i}", 1, 1, MemberStatus.ALIVE, THERE))
        assert plan is not None
        table.apply(plan, 0.0, told_by="")
    return Pace(GossipConfig(), table)


@pytest.mark.parametrize(
    ("members", "publish_s", "change_s"), [(1, 1, 1), (30, 1, 1), (250, 1, 1), (1_000, 4, 2), (4_000, 16, 4)]
)
def test_publications_slow_down_with_the_members_and_changes_with_their_root(
    members: int, publish_s: float, change_s: float
) -> None:
    assert pace(members).publish_interval_s == pytest.approx(publish_s)
    assert pace(members).change_interval_s == pytest.approx(change_s)


def test_what_is_late_is_judged_by_the_interval() -> None:
    config, slow = GossipConfig(), pace(1_000)
    assert slow.overdue_s == pytest.approx(4 * config.overdue_s)
    assert config.evidence_age_s < slow.evidence_age_s < slow.publish_interval_s
