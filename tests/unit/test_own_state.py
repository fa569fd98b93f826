"""When a node publishes next."""

from __future__ import annotations

import pytest

from mesh.gossip_types import GossipConfig
from mesh.member import own_member
from mesh.membership import MemberTable
from mesh.own_state import OwnState
from mesh.pace import Pace
from mesh.packets import Record
from mesh.view import Address, MemberStatus, ModelLoad, NodeLoad, Readiness


def state(members: int) -> OwnState:
    """Of a node that published at time 0 among so many."""
    own = own_member("own", 1, Address("10.0.0.1", 7946), b"", 0.0)
    table = MemberTable(own)
    for i in range(members - 1):
        plan = table.plan(Record(f"n{i}", 1, 1, MemberStatus.ALIVE, Address("10.0.0.2", 7946)))
        assert plan is not None
        table.apply(plan, 0.0, told_by="")
    made = OwnState(GossipConfig(), Pace(GossipConfig(), table), own, 0.0)
    made.set_load(load(0), 0.0)
    made.publish(0.0)
    return made


def load(step_count: int) -> NodeLoad:
    return NodeLoad(Readiness.READY, models={"demo": ModelLoad(step_count=step_count)})


@pytest.mark.parametrize(("members", "at"), [(30, 1.0), (1_000, 4.0)])
def test_an_unchanged_load_waits_for_its_interval(members: int, at: float) -> None:
    made = state(members)
    made.set_load(load(0), 0.5)
    assert made.publish_at == pytest.approx(at)


@pytest.mark.parametrize(("members", "at"), [(30, 1.0), (1_000, 2.0)])
def test_a_changed_load_goes_sooner_in_a_large_mesh(members: int, at: float) -> None:
    made = state(members)
    made.set_load(load(1), 0.5)
    assert made.publish_at == pytest.approx(at)


def test_a_load_that_changes_late_in_its_interval_goes_at_once() -> None:
    made = state(1_000)
    made.set_load(load(1), 3.0)
    assert made.publish_at == pytest.approx(3.0)
