"""The keyring file: what a start makes of it and the configuration, and that a change is kept before it holds."""

from __future__ import annotations

import base64
import json
import logging
from pathlib import Path

import pytest

from mesh.errors import KeyRefused
from mesh.seal import DEVELOPMENT_KEY, KEYS_MAX, key_id
from nodes.config import ConfigInvalid, NodeConfig, load_config
from nodes.keyring_file import FILE_NAME, REMOVED_MAX, KeyringFile, load_keyring

A, B, C = (bytes([i]) * 32 for i in range(3))


def config(key: bytes | None, mesh: str = "127.0.0.1:7946") -> NodeConfig:
    environment = {} if key is None else {"AI_CLUSTER_KEY": base64.b64encode(key).decode()}
    return load_config(None, environment, {"mesh": mesh})


def load(folder: Path, key: bytes | None = A) -> KeyringFile:
    return load_keyring(folder, config(key))


async def rotated(folder: Path) -> KeyringFile:
    """From A to B, with A removed."""
    keyring = load(folder)
    await keyring.install(B)
    await keyring.use(key_id(B))
    await keyring.remove(key_id(A))
    return keyring


async def test_the_ring_of_the_file_wins_over_the_configured_key(tmp_path: Path) -> None:
    keyring = load(tmp_path)
    await keyring.install(B)
    await keyring.use(key_id(B))
    assert load(tmp_path).ring.keys == (B, A)
    assert load(tmp_path, None).ring.keys == (B, A)
    assert (tmp_path / FILE_NAME).stat().st_mode & 0o777 == 0o600


def test_before_the_first_change_the_configuration_decides(tmp_path: Path) -> None:
    assert load(tmp_path, A).ring.keys == (A,)
    assert load(tmp_path, B).ring.keys == (B,)
    assert load(tmp_path, None).ring.keys == (DEVELOPMENT_KEY,)
    assert not (tmp_path / FILE_NAME).exists()


async def test_a_configured_key_that_was_removed_is_not_taken_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await rotated(tmp_path)
    for _ in range(2):
        assert load(tmp_path, A).ring.keys == (B,)
    record = caplog.records[-1]
    assert "was removed from this node's keyring" in record.message
    assert (record.__dict__["cluster_key_id"], record.__dict__["primary"]) == (key_id(A).hex(), key_id(B).hex())


async def test_a_configured_key_that_the_file_does_not_know_is_accepted_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await rotated(tmp_path)
    with caplog.at_level(logging.INFO):
        assert load(tmp_path, C).ring.keys == (B, C)
    assert "goes on to seal with the primary key" in caplog.text
    assert caplog.records[-1].__dict__["primary"] == key_id(B).hex()
    assert load(tmp_path, None).ring.keys == (B, C)


async def test_a_configured_key_that_finds_the_ring_full_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keyring = load(tmp_path)
    for index in range(KEYS_MAX - 1):
        await keyring.install(bytes([100 + index]) * 32)
    assert C not in load(tmp_path, C).ring.keys
    assert f"holds {KEYS_MAX} keys" in caplog.records[-1].__dict__["reason"]


async def test_the_public_development_key_is_rotated_away_for_good(tmp_path: Path) -> None:
    keyring = load(tmp_path, None)
    await keyring.install(B)
    await keyring.use(key_id(B))
    with pytest.raises(ConfigInvalid, match="public development key"):
        load_keyring(tmp_path, config(None, "10.0.0.1:7946"))
    await keyring.remove(key_id(DEVELOPMENT_KEY))
    assert load(tmp_path, None).ring.keys == (B,)
    assert load_keyring(tmp_path, config(None, "10.0.0.1:7946")).ring.keys == (B,), "no key need be configured then"


async def test_a_removed_key_that_is_installed_again_is_taken_as_configured_again(tmp_path: Path) -> None:
    keyring = await rotated(tmp_path)
    await keyring.install(A)
    assert load(tmp_path, A).ring.keys == (B, A)
    assert json.loads((tmp_path / FILE_NAME).read_text())["removed"] == []


async def test_a_change_that_cannot_be_kept_does_not_hold(tmp_path: Path) -> None:
    keyring = load(tmp_path / "absent")
    with pytest.raises(OSError, match="No such file"):
        await keyring.install(B)
    assert keyring.ring.keys == (A,)
    with pytest.raises(KeyRefused):
        await keyring.use(key_id(B))


async def test_a_repeated_change_writes_nothing(tmp_path: Path) -> None:
    keyring = await rotated(tmp_path)
    before = (tmp_path / FILE_NAME).stat()
    await keyring.install(B)
    await keyring.use(key_id(B))
    await keyring.remove(key_id(A))
    assert (tmp_path / FILE_NAME).stat().st_ino == before.st_ino, "the file was not replaced"


async def test_the_removed_keys_remembered_are_bounded(tmp_path: Path) -> None:
    keyring = load(tmp_path)
    old = tuple(index.to_bytes(4, "big") for index in range(REMOVED_MAX))
    keyring = KeyringFile(keyring.ring, old, tmp_path / FILE_NAME)
    await keyring.install(B)
    await keyring.remove(key_id(B))
    removed = json.loads((tmp_path / FILE_NAME).read_text())["removed"]
    assert (len(removed), removed[-1]) == (REMOVED_MAX, key_id(B).hex())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff\xfe",
        b'{"format": 2, "keys": [], "removed": []}',
        b'{"format": 1, "keys": [], "removed": []}',
        b'{"format": 1, "keys": ["c2VjcmV0"], "removed": []}',
        b'{"format": 1, "keys": ["' + base64.b64encode(A) + b'"], "removed": ["zz"]}',
        b'{"format": 1, "keys": ["' + base64.b64encode(A) + b'"], "removed": ["00"]}',
        b'{"format": 1, "keys": 7, "removed": []}',
    ],
)
def test_a_damaged_file_is_named_with_the_fix_and_not_quoted(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(ConfigInvalid, match=r"keyring: it is no keyring .*--cluster-key-file") as raised:
        load(tmp_path)
    assert "c2VjcmV0" not in str(raised.value)
