"""Digests over ranges: who lacks what, and that in the end nobody does."""

from __future__ import annotations

import random

import pytest

from mesh.anti_entropy import LACKING_MAX, DigestTurns, Lacking, build_digest, compare, is_behind
from mesh.gossip_types import GossipConfig
from mesh.member import own_member
from mesh.membership import MemberTable
from mesh.packets import Digest, DigestEntry, Packet, Record
from mesh.state import encode_profile
from mesh.view import Address, MemberStatus, NodeProfile
from mesh.wire import DIGEST_ENTRIES_MAX, PAYLOAD_BYTES_MAX, encode

ALIVE, SUSPECT, DEAD, LEFT = MemberStatus
THERE = Address("10.0.0.2", 7946)
WARM = encode_profile(NodeProfile(version="1"))


def record(
    node_id: str, version: int = 1, status: MemberStatus = ALIVE, *, warm_version: int = 0, warm: bytes | None = None
) -> Record:
    return Record(node_id, 1, version, status, THERE, warm_version, None, warm)


def table(*records: Record, own: str = "own") -> MemberTable:
    made = MemberTable(own_member(own, 1, Address("10.0.0.1", 7946), b"", 0.0))
    for item in records:
        plan = made.plan(item)
        assert plan is not None
        made.apply(plan, 1.0, told_by="")
    return made


def entry(version: int, status: MemberStatus = ALIVE, *, generation: int = 1, profile: int = 0) -> DigestEntry:
    return DigestEntry(7, generation, version, status, profile)


@pytest.mark.parametrize(
    ("ours", "theirs", "behind"),
    [
        pytest.param(entry(5), entry(5), False, id="the same"),
        pytest.param(entry(5), entry(7), False, id="a load a little older"),
        pytest.param(entry(5), entry(8), True, id="a load too old"),
        pytest.param(entry(9), entry(5), False, id="newer"),
        pytest.param(entry(5), entry(5, SUSPECT), True, id="a suspicion unheard of"),
        pytest.param(entry(6), entry(5, DEAD), False, id="an obituary outlived"),
        pytest.param(entry(5, DEAD), entry(6), True, id="a return unheard of"),
        pytest.param(entry(5), entry(5, profile=4), True, id="a profile missing"),
        pytest.param(entry(9, profile=3), entry(5, profile=4), True, id="a profile missing despite a newer load"),
        pytest.param(entry(90, LEFT), entry(1, generation=2), True, id="another life"),
        pytest.param(entry(1, generation=2), entry(90), False, id="a former life"),
    ],
)
def test_who_is_behind_is_told(ours: DigestEntry, theirs: DigestEntry, behind: bool) -> None:
    assert is_behind(ours, theirs, 3) is behind


def test_over_the_turns_digests_cover_everybody_and_each_fits_a_datagram() -> None:
    made = table(*[record(f"node-with-a-name-{i}") for i in range(300)])
    seen: list[int] = []
    low = 0
    while True:
        digest, low = build_digest(made, low)
        assert len(digest.entries) <= DIGEST_ENTRIES_MAX
        assert len(encode(Packet("x" * 64, digest))) <= PAYLOAD_BYTES_MAX
        seen += [e.id_hash for e in digest.entries]
        if low == 0:
            break
    assert sorted(seen) == sorted(m.id_hash for m in made.members.values())


def test_ranges_tell_of_members_the_sender_has_never_heard_of() -> None:
    knows_many = table(*[record(f"m{i}") for i in range(200)])
    knows_none = table(own="other")
    digest, _ = build_digest(knows_none, 0)
    difference = compare(knows_many, digest, "other", 3)
    assert len(difference.lacking) == 201
    assert [e.generation for e in difference.wanted] == [0]


def test_the_sender_is_not_told_of_itself() -> None:
    made = table(record("b"), record("c"))
    difference = compare(made, Digest(0, 2**32 - 1, ()), "b", 3)
    assert {found.member.node_id for found in difference.lacking} == {"own", "c"}


def test_a_profile_goes_along_only_where_it_is_missing() -> None:
    made = table(record("b", 5, SUSPECT, warm_version=2, warm=WARM))
    member = made.members["b"]
    for held, expected in ((2, False), (0, True)):
        theirs = DigestEntry(member.id_hash, 1, 5, ALIVE, held)
        assert compare(made, Digest(1, 0, (theirs,)), "c", 3).lacking == [Lacking(member, expected, False)]


def test_of_the_dead_only_who_asks_is_told() -> None:
    made = table(record("b", 5, DEAD))
    member = made.members["b"]
    assert compare(made, Digest(0, 2**32 - 1, ()), "own", 3).lacking == []
    asked = Digest(1, 0, (DigestEntry(member.id_hash, 1, 5, ALIVE, 0),))
    assert compare(made, asked, "c", 3).lacking == [Lacking(member, False, False)]


def test_two_tables_agree_after_one_exchange_each_way() -> None:
    one = table(*[record(f"m{i}", 5 + i % 3, warm_version=1, warm=WARM) for i in range(60)], own="x")
    two = table(*[record(f"m{i}", 9 - i % 3, SUSPECT) for i in range(30, 70)], own="y")
    digest, low = build_digest(one, 0)
    assert low == 0
    difference = compare(two, digest, "x", 1)
    wanted = compare(one, Digest(1, 0, difference.wanted), "y", 1)
    for target, members in ((one, difference.lacking), (two, wanted.lacking)):
        for found in members:
            plan = target.plan(found.member.record(with_warm=found.with_warm, with_bulk=found.with_bulk))
            if plan is not None:
                target.apply(plan, 2.0, told_by="")
    for name in [f"m{i}" for i in range(70)]:
        assert one.members[name].digest_entry() == two.members[name].digest_entry()


def test_who_lacks_a_profile_is_asked_in_a_hurry_until_it_is_there() -> None:
    config = GossipConfig()
    made = table(record("b", 5, warm_version=2), record("c"))
    turns = DigestTurns(config, made, random.Random(1), 0.0)
    turns.hurry(made.members["b"], 10.0)
    asked = []
    for step in range(8):
        now = 10.25 + step * config.digest_hurry_s
        assert turns.next_at <= now
        asked.append(turns.due(now))
        assert made.members["b"].id_hash in [e.id_hash for e in turns.build().entries]
    assert asked[::2] == [made.members["b"]] * 4
    assert made.members["c"] in asked[1::2]  # who may have it, should the member itself not be heard
    plan = made.plan(record("b", 5, warm_version=2, warm=WARM))
    assert plan is not None
    made.apply(plan, 13.0, told_by="")
    assert turns.due(13.0) is not None
    assert turns.next_at == 13.0 + config.digest_interval_s


def test_profiles_asked_for_at_one_time_are_bounded() -> None:
    made = table(*[record(f"m{i}", 5, warm_version=2) for i in range(LACKING_MAX + 20)])
    turns = DigestTurns(GossipConfig(), made, random.Random(1), 0.0)
    for member in made.live:
        turns.hurry(member, 1.0)
    assert len(turns._lacking) == LACKING_MAX
    turns.next_at = 50.0
    turns.hurry(next(m for m in made.live if m.node_id not in turns._lacking), 2.0)
    assert turns.next_at == 50.0


def test_nobody_to_compare_with_is_no_fault() -> None:
    turns = DigestTurns(GossipConfig(), table(), random.Random(1), 0.0)
    assert turns.due(5.0) is None
    assert turns.next_at > 5.0
