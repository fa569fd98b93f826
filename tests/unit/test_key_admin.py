"""How operators name a key."""

from __future__ import annotations

import pytest

from nodes.access.api_key import KeySettings
from nodes.access.key_book import KeyUnknown
from tests.unit.fake_access import FakeAccess


async def test_a_family_names_its_key_when_the_first_one_is_gone() -> None:
    access = FakeAccess()
    first = (await access.admin.create(KeySettings("alice"))).key
    await access.admin.create(KeySettings("bob"))
    second = (await access.admin.rotate("alice", grace_s=0)).key
    assert second.label == first.label
    for name in (first.label, first.family, second.public_id, "alice"):
        assert access.admin.find(name) == second
    await access.admin.revoke(first.label)
    with pytest.raises(KeyUnknown, match="was revoked"):
        access.admin.find(first.label)


async def test_keys_of_one_family_are_told_by_their_ids_until_one_has_expired() -> None:
    access = FakeAccess()
    first = (await access.admin.create(KeySettings("alice"))).key
    second = (await access.admin.rotate("alice", grace_s=0)).key
    third = (await access.admin.rotate(first.label, grace_s=3600)).key
    for name in (first.label, "alice"):
        with pytest.raises(KeyUnknown) as unknown:
            access.admin.find(name)
        assert second.public_id in str(unknown.value)
        assert third.public_id in str(unknown.value)
    access.wall_time += 3600
    for name in (first.label, "alice"):
        assert access.admin.find(name) == third
