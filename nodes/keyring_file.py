"""A node's keyring and the file that keeps it: a change is on disk before it holds, so no restart forgets one.

The file appears with the first change. From then on it decides, and not the configuration: a key that was rotated away
must not come back because a configuration file still names it.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from mesh.errors import KeyRefused
from mesh.seal import DEVELOPMENT_KEY, KEY_ID_BYTES, Keyring, key_id
from nodes.config import ConfigInvalid, NodeConfig, is_loopback
from nodes.data_directory import SECRET_MODE, folder_fix, write_durably

logger = logging.getLogger(__name__)

FILE_NAME = "keyring"
FORMAT = 1
# Ids of removed keys that are remembered; beyond it a key removed so long ago could be configured again unnoticed.
REMOVED_MAX = 256


@dataclass(frozen=True, slots=True)
class _Stored:
    """keys: the primary first. removed: ids, oldest first."""

    keys: tuple[bytes, ...]
    removed: tuple[bytes, ...]


class KeyringFile:
    """One node's ring, its file, and the changes that an operator makes. Made by load_keyring()."""

    def __init__(self, ring: Keyring, removed: tuple[bytes, ...], file: Path) -> None:
        self._ring = ring
        self._removed = removed
        self._file = file
        self._lock = trio.Lock()

    @property
    def ring(self) -> Keyring:
        """The one that seals; it changes in place."""
        return self._ring

    async def install(self, key: bytes) -> None:
        """Accept a key. Raises KeyRefused, or OSError where the file cannot be written; nothing is changed then."""
        await self._change(lambda ring: ring.install(key))

    async def use(self, identity: bytes) -> None:
        """Seal under a key from now on. Raises as install() does."""
        await self._change(lambda ring: ring.use(identity))

    async def remove(self, identity: bytes) -> None:
        """Accept a key no more, now and after restarts. Raises as install() does."""
        await self._change(lambda ring: ring.remove(identity))

    async def _change(self, change: Callable[[Keyring], object]) -> None:
        async with self._lock:
            after = Keyring(self.ring.keys, self.ring.cluster_name)
            change(after)
            if after.key_ids == self.ring.key_ids:
                return
            removed = _removed_after(self._removed, self.ring, after)
            await trio.to_thread.run_sync(partial(_write, self._file, _Stored(after.keys, removed)))
            # Nothing is awaited from here on: the ring is as the file says, whoever is cancelled.
            self._removed = removed
            change(self.ring)


def load_keyring(folder: Path, config: NodeConfig) -> KeyringFile:
    """The ring that a node starts with: that of the file in its data directory, or else the configured key.

    A configured key that the file does not know is added, not used; one that was removed is not taken back. Raises
    ConfigInvalid."""
    file = folder / FILE_NAME
    stored, configured = _stored_and_configured(file, config)
    if stored is None:
        return KeyringFile(Keyring([config.cluster_key()], config.cluster_name), (), file)
    ring = Keyring(stored.keys, config.cluster_name)
    if configured is not None and key_id(configured) not in ring:
        _take_configured(configured, ring, stored, file)
    return KeyringFile(ring, stored.removed, file)


def check_keyring(folder: Path, config: NodeConfig) -> None:
    """Raises ConfigInvalid where load_keyring() would; changes nothing."""
    stored, _ = _stored_and_configured(folder / FILE_NAME, config)
    if stored is None:
        config.cluster_key()


def _stored_and_configured(file: Path, config: NodeConfig) -> tuple[_Stored | None, bytes | None]:
    """What the file holds, and the configured key. Raises ConfigInvalid for what no node may start with."""
    stored = _read(file)
    if stored is None:
        return None, config.configured_key()
    ring = Keyring(stored.keys, config.cluster_name)
    if key_id(DEVELOPMENT_KEY) in ring and not is_loopback(config.mesh.host):
        raise ConfigInvalid(
            f"mesh address {config.mesh} is off loopback, and {file} holds the public development key; start once on "
            f"loopback and remove key {key_id(DEVELOPMENT_KEY).hex()}, or delete the file and pass --cluster-key-file"
        )
    return stored, config.configured_key()


def _take_configured(configured: bytes, ring: Keyring, stored: _Stored, file: Path) -> None:
    name, primary = key_id(configured).hex(), ring.primary_id.hex()
    if key_id(configured) in stored.removed:
        logger.warning(
            "the configured cluster key was removed from this node's keyring, which is what it uses, and is not taken "
            "back; put the primary key into cluster_key_file, or leave that out",
            extra={"cluster_key_id": name, "primary": primary, "file": str(file)},
        )
        return
    try:
        ring.install(configured)
    except KeyRefused as exc:
        logger.warning("the configured cluster key is not taken", extra={"cluster_key_id": name, "reason": str(exc)})
        return
    try:
        _write(file, _Stored(ring.keys, stored.removed))
    except OSError as exc:
        raise ConfigInvalid(f"{file}: {exc.strerror}; {folder_fix(exc, '--data-dir')}") from exc
    logger.info(
        "the configured cluster key is accepted from now on; this node goes on to seal with the primary key "
        "(ai-cluster keyring use)",
        extra={"cluster_key_id": name, "primary": primary},
    )


def _removed_after(removed: tuple[bytes, ...], before: Keyring, after: Keyring) -> tuple[bytes, ...]:
    gone = [identity for identity in before.key_ids if identity not in after]
    return tuple(identity for identity in (*removed, *gone) if identity not in after)[-REMOVED_MAX:]


def _write(file: Path, stored: _Stored) -> None:
    content = {
        "format": FORMAT,
        "keys": [base64.b64encode(key).decode() for key in stored.keys],
        "removed": [identity.hex() for identity in stored.removed],
    }
    write_durably(file, json.dumps(content, indent=1) + "\n", mode=SECRET_MODE)


def _read(file: Path) -> _Stored | None:
    """None where there is no file. Raises ConfigInvalid, which never quotes the content."""
    try:
        content = json.loads(file.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r} is of a later version")
        keys = tuple(base64.b64decode(text, validate=True) for text in content["keys"])
        removed = tuple(bytes.fromhex(text) for text in content["removed"])
        Keyring(keys)  # checks number and sizes
        if any(len(identity) != KEY_ID_BYTES for identity in removed):
            raise ValueError(f"an id of a removed key is not {KEY_ID_BYTES} bytes long")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, binascii.Error) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else f"it is no keyring ({type(exc).__name__})"
        raise ConfigInvalid(
            f"{file}: {reason}; restore it from a backup, or delete it and start with the mesh's key in "
            "--cluster-key-file"
        ) from exc
    return _Stored(keys, removed)
