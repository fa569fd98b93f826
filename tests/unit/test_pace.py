"""Times that grow with the number of members."""

from __future__ import annotations

import pytest

from mesh.gossip_types import GossipConfig
from mesh.membership import MemberTable, own_member
from mesh.pace import Pace
from mesh.view import Address, MemberStatus
from mesh.wire import Record

THERE = Address("10.0.0.2", 7946)


def pace(members: int) -> Pace:
    table = MemberTable(own_member("own", 1, Address("10.0.0.1", 7946), b"", 0.0))
    for i in range(members - 1):
        plan = table.plan(Record(f"n{i}", 1, 1, MemberStatus.ALIVE, THERE))
        assert plan is not None
        table.apply(plan, 0.0, told_by="")
    return Pace(GossipConfig(), table)


@pytest.mark.parametrize(("members", "slowness"), [(1, 1.0), (30, 1.0), (250, 1.0), (1_000, 2.0), (4_000, 4.0)])
def test_publications_slow_down_with_the_root_of_the_members(members: int, slowness: float) -> None:
    assert pace(members).publish_interval_s == pytest.approx(slowness * GossipConfig().publish_interval_s)


def test_what_is_late_is_judged_by_the_interval() -> None:
    config, slow = GossipConfig(), pace(1_000)
    assert slow.overdue_s == pytest.approx(2 * config.overdue_s)
    assert slow.evidence_age_s == pytest.approx(2 * config.evidence_age_s)
