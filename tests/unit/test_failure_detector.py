"""The probe cycle and the suspicion times, on a table filled by hand and a clock given."""

from __future__ import annotations

import random

import pytest

from mesh.failure_detector import AWARENESS_MAX, HASTY_MAX, PROBES_MAX, RELAYS_MAX, FailureDetector, Probe
from mesh.gossip_types import GossipConfig
from mesh.member import id_hash, own_member
from mesh.membership import MemberTable
from mesh.packets import Record
from mesh.view import Address, MemberStatus

CONFIG = GossipConfig()
THERE = Address("10.0.0.2", 7946)


def detector(*node_ids: str, seed: int = 1) -> FailureDetector:
    table = MemberTable(own_member("own", 1, Address("10.0.0.1", 7946), b"", 0.0))
    for node_id in node_ids:
        claim(table, node_id, 1, 0.0)
    return FailureDetector(CONFIG, table, random.Random(seed), 0.0)


def claim(
    table: MemberTable,
    node_id: str,
    version: int,
    now: float,
    status: MemberStatus = MemberStatus.ALIVE,
    accusers: tuple[int, ...] = (),
) -> None:
    plan = table.plan(Record(node_id, 1, version, status, THERE, accusers=accusers))
    assert plan is not None
    table.apply(plan, now, told_by="")


def first_probe(of: FailureDetector, at: float = 5.0) -> Probe:
    [probe] = of.begin(at)
    return probe


def test_every_member_is_probed_once_a_turn() -> None:
    names = [f"m{i}" for i in range(8)]
    made = detector(*names)
    probed = []
    for second in range(8):
        for name in names:
            claim(made._table, name, 10 + second, 5.0 + second)
        probe = first_probe(made, 5.0 + second)
        made.answered(probe.sequence, probe.node_id, 0.0)
        probed.append(probe.node_id)
    assert sorted(probed) == names


def test_a_member_whose_publication_is_overdue_is_probed_every_other_time() -> None:
    made = detector("quiet", *[f"m{i}" for i in range(40)])
    probed = []
    for second in range(8):
        for index in range(40):
            claim(made._table, f"m{index}", 10 + second, 5.0 + second)
        probe = first_probe(made, 5.0 + second)
        made.answered(probe.sequence, probe.node_id, 0.0)
        probed.append(probe.node_id)
    assert probed[0::2] == ["quiet"] * 4
    assert "quiet" not in probed[1::2]


def test_an_unanswered_probe_asks_others_then_accuses() -> None:
    made = detector("b")
    probe = first_probe(made)
    assert made.due_indirect(5.24) == []
    assert made.due_indirect(5.25) == [probe]
    assert made.due_indirect(5.3) == []
    assert made.due_verdicts(5.49) == []
    assert [m.node_id for m in made.due_verdicts(5.5)] == ["b"]
    assert made.due_verdicts(9.0) == []


def test_an_answered_probe_accuses_nobody() -> None:
    made = detector("b")
    probe = first_probe(made)
    assert not made.answered(probe.sequence, "c", 0.0)
    assert not made.answered(probe.sequence + 1, "b", 0.0)
    assert made.answered(probe.sequence, "b", 0.0)
    assert not made.answered(probe.sequence, "b", 0.0)
    assert made.due_indirect(9.0) == []
    assert made.due_verdicts(9.0) == []


def test_a_newer_version_during_the_probe_outweighs_its_silence() -> None:
    made = detector("b")
    first_probe(made)
    made.due_indirect(5.25)
    claim(made._table, "b", 2, 5.3)
    assert made.due_verdicts(5.5) == []
    assert made.awareness == 0


def test_a_member_heard_lately_is_accused_only_once_its_word_is_overdue() -> None:
    made = detector("b")
    claim(made._table, "b", 2, 4.9)
    first_probe(made)
    made.due_indirect(5.25)
    assert made.due_verdicts(5.5) == []
    assert made.next_wakeup() <= 4.9 + CONFIG.evidence_age_s
    assert [m.node_id for m in made.due_verdicts(4.9 + CONFIG.evidence_age_s)] == ["b"]


def test_an_answer_over_the_link_ends_the_probe() -> None:
    made = detector("b")
    first_probe(made)
    made.due_indirect(5.25)
    made.answered_otherwise("b")
    assert made.due_verdicts(5.5) == []


@pytest.mark.parametrize(
    ("asked", "nacks", "awareness"),
    [(0, 0, 1), (3, 3, 0), (3, 1, 2), (3, 9, 0)],
    ids=["nobody to ask", "all others are well", "two others are silent as well", "more nacks than asked"],
)
def test_missing_nacks_speak_against_oneself(asked: int, nacks: int, awareness: int) -> None:
    made = detector("b")
    probe = first_probe(made)
    made.due_indirect(5.25)
    probe.asked_count = asked
    for _ in range(nacks):
        made.nacked(probe.sequence)
    made.due_verdicts(5.5)
    assert made.awareness == awareness


def test_a_node_that_doubts_itself_waits_longer_for_answers() -> None:
    made = detector("b")
    made.adjust_awareness(3)
    probe = first_probe(made)
    assert (probe.indirect_at, probe.verdict_at) == (6.0, 7.0)
    made.answered(probe.sequence, "b", 0.0)
    assert made.awareness == 2
    made.adjust_awareness(99)
    assert made.awareness == AWARENESS_MAX


def test_a_node_alone_regains_its_trust_in_itself() -> None:
    made = detector()
    made.adjust_awareness(2)
    assert made.begin(5.0) == []
    assert made.begin(6.0) == []
    assert made.awareness == 0


def test_a_member_in_haste_is_probed_before_its_turn_and_once() -> None:
    made = detector("b", "c")
    probe = first_probe(made)
    other = "c" if probe.node_id == "b" else "b"
    assert not made.hasten(probe.node_id)
    assert made.hasten(other)
    assert not made.hasten(other)
    assert [p.node_id for p in made.begin(5.01)] == [other]


def test_waiting_probes_are_bounded() -> None:
    names = [f"m{i}" for i in range(40)]
    made = detector(*names)
    assert sum(made.hasten(name) for name in names) == HASTY_MAX
    assert len(made.begin(5.0)) <= PROBES_MAX
    assert len(made.begin(6.0)) == 0
    assert len(made._probes) == PROBES_MAX


def test_a_ping_for_another_is_answered_or_denied_in_time() -> None:
    made = detector("b")
    origin = Address("10.0.0.9", 7946)
    first, second = made.relay(origin, 77, "b", 1.0), made.relay(origin, 78, "b", 1.0)
    assert made.relay_answered(first, "c") is None
    relay = made.relay_answered(first, "b")
    assert relay is not None
    assert (relay.origin, relay.origin_sequence) == (origin, 77)
    assert made.due_nacks(1.19) == []
    assert [r.origin_sequence for r in made.due_nacks(1.2)] == [78]
    assert made.relay_answered(second, "b") is None


def test_pings_for_others_are_bounded() -> None:
    made = detector("b")
    for index in range(RELAYS_MAX + 5):
        made.relay(THERE, index, "b", 1.0)
    assert len(made.due_nacks(9.0)) == RELAYS_MAX


def suspected(count: int, accusers: int) -> FailureDetector:
    made = detector("b", *[f"m{i}" for i in range(count - 2)])
    claim(made._table, "b", 1, 10.0, MemberStatus.SUSPECT, tuple(range(accusers)))
    made.watch(made._table.members["b"])
    return made


@pytest.mark.parametrize(
    ("count", "accusers", "lasts_s"),
    [
        pytest.param(2, 1, 3.0, id="two nodes, nobody to confirm"),
        pytest.param(3, 1, 3.0, id="three nodes, too few to confirm"),
        pytest.param(10, 1, 6.0, id="unconfirmed"),
        pytest.param(10, 2, 6.0 - 3.0 * 0.6309, id="confirmed once"),
        pytest.param(10, 3, 3.0, id="confirmed twice"),
        pytest.param(100, 3, 4.2, id="a hundred nodes, confirmed twice"),
        pytest.param(100, 1, 8.4, id="a hundred nodes, unconfirmed"),
        pytest.param(1_000, 3, 5.4, id="a thousand nodes, confirmed twice"),
    ],
)
def test_a_suspicion_lasts_by_size_and_confirmations(count: int, accusers: int, lasts_s: float) -> None:
    made = suspected(count, accusers)
    assert made.due_deaths(10.0 + lasts_s - 0.001) == []
    assert [m.node_id for m in made.due_deaths(10.0 + lasts_s + 0.001)] == ["b"]


def test_of_a_thousand_who_hear_of_a_suspicion_a_few_ask_the_suspect_at_once() -> None:
    made = suspected(1_000, 1)
    member = made._table.members["b"]
    asked = 0
    for _ in range(1_000):
        asked += made.wants_to_confirm(member)
        made._hasty.clear()
    assert 1 <= asked <= 20  # six of a thousand in the mean


def test_in_a_small_mesh_nobody_asks_a_suspect_out_of_turn() -> None:
    made = suspected(30, 1)
    assert not any(made.wants_to_confirm(made._table.members["b"]) for _ in range(1_000))


def test_a_confirmation_shortens_a_running_suspicion() -> None:
    made = suspected(10, 1)
    claim(made._table, "b", 1, 11.0, MemberStatus.SUSPECT, (0, 1, 2))
    made.watch(made._table.members["b"])
    assert [m.node_id for m in made.due_deaths(13.001)] == ["b"]


def test_a_refuted_suspicion_kills_nobody() -> None:
    made = suspected(10, 3)
    claim(made._table, "b", 2, 12.0)
    assert made.due_deaths(99.0) == []
    assert made.watched_count == 0


def test_a_second_suspicion_gets_its_full_time() -> None:
    made = suspected(10, 3)
    claim(made._table, "b", 2, 12.0)
    claim(made._table, "b", 2, 12.5, MemberStatus.SUSPECT, (0, 1, 2))
    made.watch(made._table.members["b"])
    assert made.due_deaths(13.5) == []
    assert [m.node_id for m in made.due_deaths(15.6)] == ["b"]


def test_suspicions_raised_again_and_again_take_no_more_room() -> None:
    made = detector("m", "n", "o")
    for version in range(2, 1_000):
        claim(made._table, "m", version, version / 100, MemberStatus.SUSPECT)
        made.watch(made._table.members["m"])
    assert made.watched_count == 1
    assert made.due_deaths(9.9) == []
    assert [m.node_id for m in made.due_deaths(9.99 + 2 * CONFIG.suspicion_min_s + 0.1)] == ["m"]


def test_this_node_joins_the_accusers_it_knows() -> None:
    made = suspected(10, 1)
    member = made._table.members["b"]
    assert made.accusers_with_own(member) == (0, id_hash("own"))
    claim(made._table, "b", 2, 12.0)
    assert made.accusers_with_own(member) == (id_hash("own"),)


def test_after_a_stall_no_probe_under_way_counts() -> None:
    made = detector("b")
    first_probe(made)
    made.forgive()
    assert made.due_indirect(9.0) == []
    assert made.due_verdicts(9.0) == []
    assert made.awareness == 1
