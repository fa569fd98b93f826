"""Keys as tokens and as records."""

from __future__ import annotations

from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.replica import VALUE_BYTES_MAX
from nodes.access.api_key import (
    KeyMalformed,
    KeySettings,
    decode_key,
    encode_key,
    new_key,
    public_id_of,
)

limits = st.none() | st.integers(1, 2**53)
settings = st.builds(
    KeySettings,
    name=st.text(st.characters(codec="utf-8", categories=("L", "N", "P")), min_size=1, max_size=100),
    requests_per_minute=limits,
    tokens_per_minute=limits,
    concurrency=limits,
    models=st.lists(st.text(min_size=1, max_size=30), max_size=16).map(tuple),
    priority=st.integers(1, 100),
    expires_at=st.none() | st.integers(1, 2**37),
    is_enabled=st.booleans(),
)


@given(settings)
def test_a_key_survives_its_record_and_its_token_opens_it(made: KeySettings) -> None:
    key, token = new_key(made, 1_700_000_000.5)
    assert decode_key(key.record_id, encode_key(key)) == key
    assert public_id_of(token) == key.public_id
    assert key.accepts(token)
    assert not key.accepts(token[:-1] + ("a" if token[-1] != "a" else "b"))
    assert token.isascii()
    assert token.replace("-", "").isalnum()


def test_the_record_holds_nothing_of_the_secret() -> None:
    key, token = new_key(KeySettings("n"), 0.0)
    secret = token.rpartition("-")[2]
    assert secret.encode() not in encode_key(key)
    assert token not in repr(key)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"name": "two\nlines"},
        {"name": "x" * 101},
        {"requests_per_minute": 0},
        {"tokens_per_minute": -1},
        {"concurrency": 2**60},
        {"priority": 0},
        {"priority": 101},
        {"expires_at": 0},
        {"models": ("",)},
        {"models": tuple(map(str, range(17)))},
    ],
)
def test_settings_that_no_key_may_have_are_refused_by_name(changes: dict[str, object]) -> None:
    with pytest.raises(KeyMalformed, match=f"^{next(iter(changes))}:"):
        replace(KeySettings("n"), **changes).check()  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "sk-", "sk-abc", "sk--x", "pk-abc-def", "sk-a_b-c", "sk-abc-def ", "sk-é-x"])
def test_what_is_no_token_has_no_id(text: str) -> None:
    assert public_id_of(text) is None


packable = st.recursive(st.none() | st.integers(0, 2**62) | st.text(), st.lists)


@given(st.binary(max_size=200) | packable.map(msgpack.packb))
def test_bytes_that_are_no_record_are_refused(value: bytes) -> None:
    with pytest.raises(KeyMalformed):
        decode_key("key/abc", value)


def test_a_record_of_a_later_version_with_more_fields_is_read() -> None:
    key, _ = new_key(KeySettings("n"), 5.0)
    fields = [*msgpack.unpackb(encode_key(key)), "new"]
    assert decode_key(key.record_id, msgpack.packb(fields)) == key


def test_the_longest_usual_key_fits_a_record() -> None:
    key, _ = new_key(KeySettings("x" * 100, 2**53, 2**53, 2**53, ("m" * 40,) * 16, 100, 2**37), 2**37)
    assert len(encode_key(key)) <= VALUE_BYTES_MAX
