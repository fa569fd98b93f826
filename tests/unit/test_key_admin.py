"""How operators name a key."""

from __future__ import annotations

import pytest

from nodes.access.api_key import KeySettings
from nodes.access.key_book import KeyAmbiguous, KeyUnknown
from tests.unit.fake_access import FakeAccess


@pytest.mark.parametrize("grace_s", [0, 3600])
async def test_a_key_that_is_revoked_again_is_not_its_successor(grace_s: int) -> None:
    access = FakeAccess()
    first = (await access.admin.create(KeySettings("alice"))).key
    await access.admin.create(KeySettings("bob"))
    second = (await access.admin.rotate("alice", grace_s=grace_s)).key
    assert second.label == first.label  # logs and metrics go on under one
    if grace_s:
        await access.admin.revoke(f"sk-{first.public_id}")
    for name in (f"sk-{first.public_id}", first.public_id, first.label):
        for act in (
            access.admin.revoke,
            lambda name: access.admin.rotate(name, 0),
            lambda name: access.admin.change(name, {}),
        ):
            with pytest.raises(KeyUnknown, match=f"was revoked, .*in its place works sk-{second.public_id}"):
                await act(name)
    assert access.admin.find("alice") == access.admin.find(second.public_id) == second
    await access.admin.revoke("alice")
    with pytest.raises(KeyUnknown, match="was revoked, which is for ever; `ai-cluster keys list`"):
        access.admin.find(first.public_id)


async def test_keys_of_one_name_are_told_by_their_ids_until_one_has_expired() -> None:
    access = FakeAccess()
    await access.admin.create(KeySettings("alice"))
    second = (await access.admin.rotate("alice", grace_s=0)).key
    third = (await access.admin.rotate("alice", grace_s=3600)).key
    with pytest.raises(KeyAmbiguous) as ambiguous:
        access.admin.find("alice")
    assert second.public_id in str(ambiguous.value)
    assert third.public_id in str(ambiguous.value)
    access.wall_time += 3600
    assert access.admin.find("alice") == third


async def test_during_the_grace_of_a_rotation_a_name_means_two_keys_which_are_described() -> None:
    access = FakeAccess()
    first = (await access.admin.create(KeySettings("alice"))).key
    rotated = await access.admin.rotate("alice", grace_s=3600)
    assert [key.public_id for key in rotated.others] == [first.public_id]
    with pytest.raises(KeyAmbiguous) as ambiguous:
        await access.admin.revoke("alice")
    assert "with --all" in str(ambiguous.value)
    assert f"sk-{first.public_id} (made 2024-10-04T00:01:40Z, works until 2024-10-04T01:01:40Z)" in str(ambiguous.value)
    assert f"sk-{rotated.key.public_id} (made 2024-10-04T00:01:40Z)" in str(ambiguous.value)
    revoked = await access.admin.revoke(f"sk-{first.family}")  # as logs show both; it is the id of the first
    assert (revoked.key.public_id, [key.public_id for key in revoked.others]) == (
        first.public_id,
        [rotated.key.public_id],
    )


@pytest.mark.parametrize("named_by", ["name", "first id", "second id"])
async def test_all_keys_of_a_name_or_family_are_revoked_together(named_by: str) -> None:
    access = FakeAccess()
    first = (await access.admin.create(KeySettings("alice"))).key
    bob = (await access.admin.create(KeySettings("bob"))).key
    second = (await access.admin.rotate("alice", grace_s=3600)).key
    name = {"name": "alice", "first id": f"sk-{first.public_id}", "second id": second.public_id}[named_by]
    revoked = await access.admin.revoke(name, is_all=True)
    assert {revoked.key.public_id, *(key.public_id for key in revoked.also_revoked)} == {
        first.public_id,
        second.public_id,
    }
    assert revoked.others == []
    assert access.admin.keys == [bob]


async def test_a_name_that_is_another_keys_id_is_not_guessed_at() -> None:
    access = FakeAccess()
    alice = (await access.admin.create(KeySettings("alice"))).key
    other = (await access.admin.create(KeySettings(alice.public_id))).key
    with pytest.raises(KeyAmbiguous, match=f"sk-{other.public_id}"):
        await access.admin.revoke(alice.public_id)
    assert access.admin.find(f"sk-{alice.public_id}") == alice
    assert access.admin.find(other.public_id) == other


async def test_a_name_with_a_dash_is_no_id_with_a_secret() -> None:
    access = FakeAccess()
    alice = (await access.admin.create(KeySettings("alice"))).key
    with pytest.raises(KeyUnknown):
        access.admin.find(f"{alice.public_id}-laptop")
    assert access.admin.find(f"sk-{alice.public_id}-secret") == alice


async def test_usage_is_asked_of_a_key_that_is_known_or_was_revoked() -> None:
    access = FakeAccess()
    first = (await access.admin.create(KeySettings("alice"))).key
    await access.admin.rotate("alice", grace_s=3600)
    assert await access.admin.usage(0, 1, "alice") == []  # two keys, and one family
    with pytest.raises(KeyUnknown, match="'alicia' is not known here"):
        await access.admin.usage(0, 1, "alicia")
    await access.admin.revoke("alice", is_all=True)
    assert await access.admin.usage(0, 1, first.label) == []
    with pytest.raises(KeyUnknown, match="a key that was revoked goes by its id, which `ai-cluster usage` shows"):
        await access.admin.usage(0, 1, "alice")  # a name goes with its key
