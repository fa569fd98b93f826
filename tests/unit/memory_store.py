"""A store without a disk and without a thread, which a clock that jumps would not wait for."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

import trio

from mesh.counters_wire import Totals
from mesh.replica import Record
from nodes.store import DayDigest, StoreFailed, UsageRow, UsageSum


class MemoryStore:
    """See nodes.store.Store. is_full: what is put fails. is_unreadable: what is read of usage does."""

    def __init__(self) -> None:
        self.is_full = False
        self.is_unreadable = False
        self.records: list[Record] = []
        self._rows: dict[tuple[int, str, str, str, int], Totals] = {}

    async def put(self, records: Sequence[Record] = (), usage: Sequence[UsageRow] = ()) -> None:
        await trio.lowlevel.checkpoint()
        if self.is_full:
            raise StoreFailed("the disk is full")
        self.records += records
        for row in usage:
            self._rows[row.identity] = self._rows.get(row.identity, Totals()).maximum(row.totals)

    async def delete_usage(self, before_day: int) -> None:
        await trio.lowlevel.checkpoint()
        self._rows = {identity: totals for identity, totals in self._rows.items() if identity[0] >= before_day}

    async def usage_sums(self, first_day: int, last_day: int, key: str | None = None) -> list[UsageSum]:
        self._check_readable()
        sums: dict[tuple[int, str, str], Totals] = {}
        for (day, of_key, model, *_), totals in self._rows.items():
            if not first_day <= day <= last_day or key not in (None, of_key):
                continue
            sums[day, of_key, model] = sums.get((day, of_key, model), Totals()).plus(totals)
        return [UsageSum(*of, totals) for of, totals in sums.items()]

    async def usage_digests(self, first_day: int) -> list[DayDigest]:
        await trio.lowlevel.checkpoint()
        self._check_readable()
        found = []
        for day in sorted({identity[0] for identity in self._rows}):
            rows = [totals for identity, totals in self._rows.items() if identity[0] == day]
            found.append(DayDigest(day, len(rows), sum(t.requests for t in rows), sum(t.tokens for t in rows)))
        return found

    async def usage_rows(self, day: int, after: tuple[str, str, str, int] | None, rows_max: int) -> list[UsageRow]:
        await trio.lowlevel.checkpoint()
        self._check_readable()
        rows = [UsageRow(*identity, totals) for identity, totals in sorted(self._rows.items(), key=itemgetter(0))]
        return [row for row in rows if row.day == day and (after is None or row.identity[1:] > after)][:rows_max]

    def _check_readable(self) -> None:
        if self.is_unreadable:
            raise StoreFailed("the disk cannot be read")
