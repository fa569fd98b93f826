"""The API keys of the mesh as this node knows them, read from the replica, and the edits that operators make of them.

Rotation makes a new key of the same family, and lets the old one end at once or after a time of grace. Revoking is
deleting: a tombstone outdoes whatever anybody writes, so a revoked key never works again, whichever node comes back.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mesh.errors import MeshError
from mesh.replica import EditRefused, Record, Replica
from nodes.access.api_key import (
    RECORD_PREFIX,
    ApiKey,
    KeyMalformed,
    KeySettings,
    decode_key,
    encode_key,
    new_key,
    public_id_of,
)

logger = logging.getLogger(__name__)


class KeyUnknown(MeshError):
    """No key of that id, or it is revoked."""


class KeyAmbiguous(KeyUnknown):
    """Several keys are meant; the message has their ids."""


@dataclass(frozen=True, slots=True)
class NewKey:
    """drafts: to be committed, all or none; the key works from then on. token: to be shown once."""

    key: ApiKey
    token: str
    drafts: Sequence[Record]


class KeyBook:
    """Reads `replica`, and drafts edits of it; committing them is the caller's (nodes.durable_replica)."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._read: dict[str, tuple[Record, ApiKey | None]] = {}  # at most as many as there are records
        self._listed: tuple[int, list[ApiKey]] = (-1, [])
        self._has_keys: tuple[int, bool] = (-1, False)

    # Reading.

    @property
    def was_ever_used(self) -> bool:
        """A key was created once in this mesh, also where all are revoked: from then on every request needs one."""
        position, has_keys = self._has_keys
        if not has_keys and position != self._replica.position:
            has_keys = any(record_id.startswith(RECORD_PREFIX) for record_id in self._replica.records)
            self._has_keys = (self._replica.position, has_keys)
        return has_keys

    def find(self, public_id: str) -> ApiKey | None:
        record = self._replica.records.get(RECORD_PREFIX + public_id)
        return None if record is None else self._key_of(record)

    def of_token(self, token: str) -> ApiKey | None:
        """The key that the token opens. None for no token, an unknown or revoked one, or a wrong secret."""
        public_id = public_id_of(token)
        key = self.find(public_id) if public_id else None
        return key if key is not None and key.accepts(token) else None

    @property
    def keys(self) -> list[ApiKey]:
        """Those that are not revoked, the oldest first."""
        position, keys = self._listed
        if position != self._replica.position:
            found = (self._key_of(record) for record in self._replica.records.values())
            keys = sorted((key for key in found if key), key=lambda key: (key.created_at, key.public_id))
            self._listed = (self._replica.position, keys)
        return keys

    @property
    def has_unreadable(self) -> bool:
        """Of keys that are not revoked, some record is one that this version cannot read."""
        live = (record for record in self._replica.records.values() if record.record_id.startswith(RECORD_PREFIX))
        return any(record.value is not None and self._key_of(record) is None for record in live)

    def is_revoked(self, public_id: str) -> bool:
        record = self._replica.records.get(RECORD_PREFIX + public_id)
        return record is not None and record.is_deleted

    @property
    def revoked_count(self) -> int:
        return self._replica.statistics().tombstones

    # Editing.

    def create(self, settings: KeySettings, wall_time: float) -> NewKey:
        """Raises KeyMalformed, and EditRefused where there are too many keys or another one has the name."""
        self._check_name_is_free(settings.name)
        key, token = new_key(settings, wall_time)
        if key.has_expired(wall_time):  # the first key closes an open mesh: one that opens nothing would lock it
            raise KeyMalformed("expires_at: this time has passed")
        return NewKey(key, token, [self._draft(key)])

    def change(self, public_id: str, settings: KeySettings) -> tuple[ApiKey, Sequence[Record]]:
        """(the key as it will be, the drafts). Raises KeyUnknown, KeyMalformed, EditRefused."""
        settings.check()
        former = self._known(public_id)
        if settings.name != former.settings.name:
            self._check_name_is_free(settings.name, former.family)
        key = replace(former, settings=settings)
        return key, [self._draft(key)]

    def rotate(self, public_id: str, wall_time: float, grace_s: int) -> NewKey:
        """A new key for the old one, which ends after grace_s. Raises KeyUnknown, KeyMalformed, EditRefused."""
        former = self._known(public_id)
        if former.has_expired(wall_time):
            raise KeyMalformed("expires_at: this key has expired, and its new one would have too; change that first")
        key, token = new_key(former.settings, wall_time, former.family)
        if grace_s <= 0:
            return NewKey(key, token, [self._draft(key), self._replica.draft_deletion(former.record_id)])
        ends_at = int(wall_time) + grace_s
        if former.settings.expires_at is not None:
            ends_at = min(ends_at, former.settings.expires_at)
        former = replace(former, settings=replace(former.settings, expires_at=ends_at))
        return NewKey(key, token, [self._draft(key), self._draft(former)])

    def revoke(self, public_id: str) -> Sequence[Record]:
        """Raises KeyUnknown for an id that was never seen here; one that is revoked may be revoked again."""
        if not self.is_revoked(public_id):
            self._known(public_id)
        return [self._replica.draft_deletion(RECORD_PREFIX + public_id)]

    def _check_name_is_free(self, name: str, family: str | None = None) -> None:
        """Raises EditRefused where a key of another family has it."""
        if any(key.settings.name == name and key.family != family for key in self.keys):
            raise EditRefused(f"there is a key named {name!r} already; give another name, or rotate that one")

    def _known(self, public_id: str) -> ApiKey:
        key = self.find(public_id)
        if key is None:
            state = "was revoked, which is for ever" if self.is_revoked(public_id) else "is not known on this node"
            raise KeyUnknown(f"the key {public_id!r} {state}; `ai-cluster keys list` shows those that work")
        return key

    def _draft(self, key: ApiKey) -> Record:
        try:
            return self._replica.draft(key.record_id, encode_key(key))
        except ValueError as exc:
            raise KeyMalformed(f"models: too long together; {exc}") from exc

    def _key_of(self, record: Record) -> ApiKey | None:
        """None for a tombstone, and for a record that this version cannot read: nothing then takes the key."""
        read = self._read.get(record.record_id)
        if read is not None and read[0] is record:
            return read[1]
        key = None
        if record.value is not None and record.record_id.startswith(RECORD_PREFIX):
            try:
                key = decode_key(record.record_id, record.value)
            except KeyMalformed as exc:
                logger.error("a key's record cannot be read", extra={"error.message": str(exc)})
        self._read[record.record_id] = (record, key)
        return key
