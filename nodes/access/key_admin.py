"""What operators do with API keys and ask of usage, through whichever node they reach. Over HTTP: nodes/api/keys.py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import trio

from mesh.replica import Record
from nodes.access.api_key import ApiKey, KeySettings
from nodes.access.gate import Gate
from nodes.access.key_book import KeyAmbiguous, KeyBook, KeyUnknown
from nodes.access.limits import Limits
from nodes.access.record_sync import RecordSync
from nodes.iso_time import iso_time
from nodes.store import Store, UsageSum

logger = logging.getLogger(__name__)

KEYS_NAMED_MAX = 8  # in an error; the list has all


@dataclass(frozen=True, slots=True)
class Edited:
    """token: of a new key, to be shown once. untold: members that have not taken the edit yet, with the reason.
    others: keys of its name or family that are as they were, and work. also_revoked: with it."""

    key: ApiKey
    token: str = ""
    untold: Mapping[str, str] = field(default_factory=dict)
    others: Sequence[ApiKey] = ()
    also_revoked: Sequence[ApiKey] = ()


class KeyAdmin:
    """wall_clock: seconds since 1970."""

    def __init__(
        self, book: KeyBook, sync: RecordSync, gate: Gate, store: Store, *, wall_clock: Callable[[], float]
    ) -> None:
        self._book = book
        self._sync = sync
        self._gate = gate
        self._store = store
        self._wall_clock = wall_clock
        self._editing = trio.Lock()  # so that no draft is made from what another edit is about to change

    @property
    def keys(self) -> list[ApiKey]:
        """Those that are not revoked, the oldest first."""
        return self._book.keys

    @property
    def revoked_count(self) -> int:
        return self._book.revoked_count

    def find(self, name: str) -> ApiKey:
        """By public id, with or without `sk-`, or by a name that is one key's alone. The id of a revoked key is never
        another's: who revokes a key twice must not end its successor. Raises KeyUnknown, KeyAmbiguous."""
        found = self._meant(name)
        found = [key for key in found if not key.has_expired(self._wall_clock())] or found
        if len(found) > 1:
            ids = ", ".join(map(self._described, found[:KEYS_NAMED_MAX]))
            raise KeyAmbiguous(f"{len(found)} keys are meant by {name!r}; give the id of one: {ids}")
        return found[0]

    def _meant(self, name: str) -> list[ApiKey]:
        """All that go by it: the one of that id, else those of that name. Expired ones too.

        Raises KeyUnknown; KeyAmbiguous for an id that is another key's name."""
        public_id = _id_in(name)
        named = [key for key in self._book.keys if key.settings.name == name]
        key = self._book.find(public_id)
        found = [] if key is None else [key]
        if found and any(key.family != found[0].family for key in named):
            raise KeyAmbiguous(
                f"{name!r} is the id of one key and the name of another; give the id with sk- before it for the first, "
                f"or for the other: {', '.join(map(self._described, named[:KEYS_NAMED_MAX]))}"
            )
        if not found and not named:
            raise KeyUnknown(self._unknown(name, public_id))
        return found or named

    def _unknown(self, name: str, public_id: str) -> str:
        """Why there is no such key, and which took its place: logs and metrics show the first id of all rotations."""
        if not self._book.is_revoked(public_id):
            return f"the key {name!r} is not known here; `ai-cluster keys list` shows those that work"
        successors = ", ".join(map(self._described, self._family_of(public_id)[:KEYS_NAMED_MAX]))
        after = f"in its place works {successors}" if successors else "`ai-cluster keys list` shows those that work"
        return f"the key {name!r} was revoked, which is for ever; {after}"

    def _family_of(self, public_id: str) -> list[ApiKey]:
        """Those made by rotating the key of that id."""
        return [key for key in self._book.keys if key.family == public_id]

    def _described(self, key: ApiKey) -> str:
        """Its id, and what tells it from its namesakes."""
        state = "" if key.settings.is_enabled else ", disabled"
        expires_at = key.settings.expires_at
        if expires_at is not None:
            word = "expired" if key.has_expired(self._wall_clock()) else "works until"
            state += f", {word} {iso_time(expires_at)}"
        return f"sk-{key.public_id} (made {iso_time(key.created_at)}{state})"

    def _others(self, key: ApiKey) -> list[ApiKey]:
        """Those of its name or family that work."""
        return [
            other
            for other in self._book.keys
            if other.public_id != key.public_id
            and (other.family == key.family or other.settings.name == key.settings.name)
            and other.settings.is_enabled
            and not other.has_expired(self._wall_clock())
        ]

    def use(self, key: ApiKey) -> dict[str, Any]:
        """What is left of its limits per minute, over all nodes."""
        settings = key.settings
        limits = Limits(settings.requests_per_minute, settings.tokens_per_minute, settings.concurrency)
        remaining = self._gate.remaining(key, limits)
        return {kind: {"limit": left.limit, "remaining": left.remaining} for kind, left in remaining.items()}

    async def create(self, settings: KeySettings) -> Edited:
        """Raises KeyMalformed, EditRefused, StoreFailed."""
        async with self._editing:
            made = self._book.create(settings, self._wall_clock())
            untold = await self._commit(made.drafts, "created an API key", made.key)
            return Edited(made.key, made.token, untold, self._others(made.key))

    async def change(self, name: str, changes: Mapping[str, Any]) -> Edited:
        """changes: fields of KeySettings. Raises KeyUnknown, KeyMalformed, EditRefused, StoreFailed."""
        async with self._editing:
            former = self.find(name)
            key, drafts = self._book.change(former.public_id, replace(former.settings, **changes))
            untold = await self._commit(drafts, "changed an API key", key)
            return Edited(key, "", untold, self._others(key))

    async def rotate(self, name: str, grace_s: int) -> Edited:
        """Raises KeyUnknown, EditRefused, StoreFailed."""
        async with self._editing:
            made = self._book.rotate(self.find(name).public_id, self._wall_clock(), grace_s)
            untold = await self._commit(made.drafts, "rotated an API key", made.key)
            return Edited(made.key, made.token, untold, self._others(made.key))

    async def revoke(self, name: str, *, is_all: bool = False) -> Edited:
        """is_all: every key that goes by this name, or is of the family of this id. Raises KeyUnknown, StoreFailed."""
        async with self._editing:
            if is_all:
                meant = self._family_of(_id_in(name)) or self._meant(name)
                families = {key.family for key in meant}
                keys = [key for key in self._book.keys if key in meant or key.family in families]
            else:
                keys = [self._one_to_revoke(name)]
            drafts = [draft for key in keys for draft in self._book.revoke(key.public_id)]
            newest = keys[-1]
            untold = await self._commit(drafts, "revoked an API key", *keys)
            return Edited(newest, "", untold, self._others(newest), keys[:-1])

    def _one_to_revoke(self, name: str) -> ApiKey:
        try:
            return self.find(name)
        except KeyAmbiguous as exc:
            raise KeyAmbiguous(f"{exc}; or revoke them all with --all (over HTTP: ?all=true)") from exc

    async def usage(self, first_day: int, last_day: int, name: str | None) -> list[UsageSum]:
        """Days since 1970, UTC. name: of a key, or the id of one that was revoked. Raises KeyUnknown, StoreFailed."""
        return await self._store.usage_sums(first_day, last_day, None if name is None else self._family(name))

    def _family(self, name: str) -> str:
        """Raises KeyUnknown, also as KeyAmbiguous."""
        try:
            meant = self._meant(name)
        except KeyAmbiguous:
            raise
        except KeyUnknown as exc:
            if self._book.is_revoked(_id_in(name)):
                return _id_in(name)
            raise KeyUnknown(f"{exc}; a key that was revoked goes by its id, which `ai-cluster usage` shows") from exc
        if len({key.family for key in meant}) > 1:
            return self.find(name).family  # which names them, or knows the one that works
        return meant[-1].family

    def names(self) -> dict[str, str]:
        """By family."""
        return {key.family: key.settings.name for key in self._book.keys}

    async def _commit(self, drafts: Sequence[Record], what: str, *keys: ApiKey) -> dict[str, str]:
        with trio.CancelScope(shield=True):  # bounded by the store's and the peers' timeouts: never half of it
            untold = await self._sync.commit(drafts)
        for key in keys:
            logger.info(what, extra={"key_id": key.label, "public_id": key.public_id, "untold": sorted(untold)})
        return untold


def _id_in(name: str) -> str:
    """The public id in what an operator gives: `sk-` before it and a secret behind it are taken away."""
    return name.removeprefix("sk-").partition("-")[0] if name.startswith("sk-") else name
