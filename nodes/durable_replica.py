"""A replica and the store under it: nothing is acknowledged, or told to peers, before it is on disk."""

from __future__ import annotations

from collections.abc import Sequence

from mesh.replica import Record, Replica
from nodes.store import Store


class DurableReplica:
    """`replica` is read, and drafted from, directly; what changes it goes through here."""

    def __init__(self, replica: Replica, store: Store) -> None:
        self.replica = replica
        self._store = store
        self._unkept: dict[str, Record] = {}

    async def commit(self, drafts: Sequence[Record]) -> list[Record]:
        """Make local edits, all or none. Returns those that changed the replica: to be told to peers at once.

        Raises StoreFailed; the replica is as it was. Not cancelled once begun."""
        await self._store.put(drafts)
        return self.replica.merge(drafts)

    async def keep(self, changed: Sequence[Record]) -> None:
        """Put on disk what peers' records changed in the replica.

        Raises StoreFailed; they count all the same, and the next call tries again to keep them."""
        self._unkept.update((record.record_id, record) for record in changed)
        trying = list(self._unkept.values())
        await self._store.put(trying)
        for record in trying:
            if self._unkept.get(record.record_id) is record:
                del self._unkept[record.record_id]
