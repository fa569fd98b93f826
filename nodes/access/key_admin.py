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
from nodes.access.key_book import KeyBook, KeyUnknown
from nodes.access.limits import Limits
from nodes.access.record_sync import RecordSync
from nodes.store import Store, UsageSum

logger = logging.getLogger(__name__)

KEYS_NAMED_MAX = 8  # in an error; the list has all


@dataclass(frozen=True, slots=True)
class Edited:
    """token: of a new key, to be shown once. untold: members that have not taken the edit yet, with the reason."""

    key: ApiKey
    token: str = ""
    untold: Mapping[str, str] = field(default_factory=dict)


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
        """By public id, with or without `sk-`, by the id of the family, which logs and metrics show, or by name; the
        latter two where they are one key's alone. Raises KeyUnknown."""
        public_id = name.removeprefix("sk-").partition("-")[0]
        key = self._book.find(public_id)
        if key is not None:
            return key
        found = [key for key in self._book.keys if key.family == public_id]
        found = found or [key for key in self._book.keys if key.settings.name == name]
        found = [key for key in found if not key.has_expired(self._wall_clock())] or found
        if len(found) > 1:
            ids = ", ".join(key.public_id for key in found[:KEYS_NAMED_MAX])
            raise KeyUnknown(f"{len(found)} keys are meant by {name!r}; give the id of one: {ids}")
        if not found:
            state = "was revoked, which is for ever" if self._book.is_revoked(public_id) else "is not known here"
            raise KeyUnknown(f"the key {name!r} {state}; `ai-cluster keys list` shows those that work")
        return found[0]

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
            return Edited(made.key, made.token, await self._commit(made.drafts, "created an API key", made.key))

    async def change(self, name: str, changes: Mapping[str, Any]) -> Edited:
        """changes: fields of KeySettings. Raises KeyUnknown, KeyMalformed, EditRefused, StoreFailed."""
        async with self._editing:
            former = self.find(name)
            key, drafts = self._book.change(former.public_id, replace(former.settings, **changes))
            return Edited(key, untold=await self._commit(drafts, "changed an API key", key))

    async def rotate(self, name: str, grace_s: int) -> Edited:
        """Raises KeyUnknown, EditRefused, StoreFailed."""
        async with self._editing:
            made = self._book.rotate(self.find(name).public_id, self._wall_clock(), grace_s)
            return Edited(made.key, made.token, await self._commit(made.drafts, "rotated an API key", made.key))

    async def revoke(self, name: str) -> Edited:
        """Raises KeyUnknown, StoreFailed."""
        async with self._editing:
            key = self.find(name)
            drafts = self._book.revoke(key.public_id)
            return Edited(key, untold=await self._commit(drafts, "revoked an API key", key))

    async def usage(self, first_day: int, last_day: int, name: str | None) -> list[UsageSum]:
        """Days since 1970, UTC. Raises StoreFailed."""
        family = None
        if name is not None:
            try:
                family = self.find(name).family
            except KeyUnknown:
                family = name.removeprefix("sk-")  # of one that is revoked
        return await self._store.usage_sums(first_day, last_day, family)

    def names(self) -> dict[str, str]:
        """By family."""
        return {key.family: key.settings.name for key in self._book.keys}

    async def _commit(self, drafts: Sequence[Record], what: str, key: ApiKey) -> dict[str, str]:
        with trio.CancelScope(shield=True):  # bounded by the store's and the peers' timeouts: never half of it
            untold = await self._sync.commit(drafts)
        logger.info("%s", what, extra={"key_id": key.label, "untold": sorted(untold)})
        return untold
