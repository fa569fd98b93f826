"""Keys of the mesh as one node reads and edits them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mesh.replica import EditRefused, Record, Replica
from nodes.access.api_key import KeyMalformed, KeySettings
from nodes.access.key_book import KeyBook, KeyUnknown, NewKey

NOW = 1_700_000_000.0


def book() -> tuple[KeyBook, Replica]:
    replica = Replica("a", 1)
    return KeyBook(replica), replica


def create(made: tuple[KeyBook, Replica], name: str, **settings: object) -> NewKey:
    new = made[0].create(KeySettings(name, **settings), NOW)  # type: ignore[arg-type]
    made[1].merge(new.drafts)
    return new


def test_a_key_works_from_its_commit_on_and_not_before() -> None:
    keys, replica = book()
    assert not keys.was_ever_used
    new = keys.create(KeySettings("alice"), NOW)
    assert keys.of_token(new.token) is None
    replica.merge(new.drafts)
    assert keys.of_token(new.token) == new.key
    assert keys.of_token(new.token + "x") is None
    assert keys.was_ever_used
    assert keys.keys == [new.key]


def test_a_revoked_key_never_works_again_whatever_is_written() -> None:
    made = keys, replica = book()
    new = create(made, "alice")
    replica.merge(keys.revoke(new.key.public_id))
    replica.merge(new.drafts)
    replica.merge([replace(new.drafts[0], clock=10**9)])
    assert keys.of_token(new.token) is None
    assert keys.is_revoked(new.key.public_id)
    assert keys.was_ever_used  # a mesh whose keys are all revoked is not open
    assert list(keys.revoke(new.key.public_id)) == [Record(new.key.record_id)]  # once more changes nothing
    with pytest.raises(KeyUnknown, match="for ever"):
        keys.change(new.key.public_id, KeySettings("bob"))


def test_a_rotation_keeps_settings_and_family_and_ends_the_old_key_at_once_or_later() -> None:
    made = keys, replica = book()
    first = create(made, "alice", requests_per_minute=7, models=("m",))
    second = keys.rotate(first.key.public_id, NOW, 0)
    replica.merge(second.drafts)
    assert keys.of_token(first.token) is None
    assert (second.key.settings, second.key.family) == (first.key.settings, first.key.public_id)
    third = keys.rotate(second.key.public_id, NOW, 3600)
    replica.merge(third.drafts)
    former = keys.of_token(second.token)
    assert former is not None
    assert not former.has_expired(NOW + 3599)
    assert former.has_expired(NOW + 3600)
    assert third.key.settings.expires_at is None
    assert third.key.family == first.key.public_id
    assert third.key.label == second.key.label == first.key.label


def test_grace_does_not_lengthen_the_life_of_a_key() -> None:
    made = keys, replica = book()
    first = create(made, "alice", expires_at=int(NOW) + 10)
    replica.merge(keys.rotate(first.key.public_id, NOW, 3600).drafts)
    former = keys.of_token(first.token)
    assert former is not None
    assert former.settings.expires_at == int(NOW) + 10


def test_names_are_given_once() -> None:
    made = book()
    create(made, "alice")
    with pytest.raises(EditRefused, match="give another name"):
        made[0].create(KeySettings("alice"), NOW)


def test_a_key_is_not_renamed_to_what_another_family_is_called() -> None:
    made = keys, replica = book()
    first, second = create(made, "alice").key, create(made, "bob").key
    with pytest.raises(EditRefused, match="'bob' already"):
        keys.change(first.public_id, replace(first.settings, name="bob"))
    replica.merge(keys.rotate(second.public_id, NOW, 3600).drafts)
    keys.change(second.public_id, replace(second.settings, name="bob", priority=3))
    keys.change(second.public_id, replace(second.settings, name="carol"))


def test_models_that_do_not_fit_a_record_are_refused_by_name() -> None:
    keys, _ = book()
    with pytest.raises(KeyMalformed, match="models: too long together"):
        keys.create(KeySettings("alice", models=tuple(f"{i}" * 120 for i in range(10))), NOW)


def test_a_record_that_cannot_be_read_opens_nothing_and_hides_nothing(caplog: pytest.LogCaptureFixture) -> None:
    made = keys, replica = book()
    new = create(made, "alice")
    replica.merge([Record("key/xyz", 5, "b", 1, b"rubbish"), Record("other/thing", 5, "b", 1, b"")])
    assert keys.find("xyz") is None
    assert keys.keys == [new.key]
    assert keys.keys == [new.key]
    assert [record.message for record in caplog.records] == ["a key's record cannot be read"]


def test_a_key_that_has_expired_is_neither_made_nor_rotated() -> None:
    made = keys, _ = book()
    with pytest.raises(KeyMalformed, match="expires_at: this time has passed"):
        keys.create(KeySettings("late", expires_at=int(NOW)), NOW)
    assert not keys.was_ever_used
    new = create(made, "alice", expires_at=int(NOW) + 10)
    with pytest.raises(KeyMalformed, match="has expired"):
        keys.rotate(new.key.public_id, NOW + 10, 0)
