"""What this node counts of each API key, and which of it is told next. counters.py says what peers make of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from mesh.counters import FINE_BUCKET_S, Used, Window
from mesh.counters_wire import (
    KEY_BYTES_MAX,
    NO_TOTALS,
    SECTION_ROWS_MAX,
    USAGE_BYTES_MAX,
    Report,
    Totals,
    encode_head,
    encode_report,
)

OWN_KEYS_MAX = 16_384  # more than there are keys that work
# A publication that was told so long ago has arrived, or is lost: then the next one, which says the same, is under way.
TRANSIT_S = 0.3


@dataclass(frozen=True, slots=True)
class Unheard:
    """What was begun here that peers need not know of yet."""

    requests: int = 0
    reserved_tokens: int = 0

    def plus(self, other: Unheard) -> Unheard:
        return Unheard(self.requests + other.requests, self.reserved_tokens + other.reserved_tokens)


NOTHING_UNHEARD = Unheard()


@dataclass(slots=True)
class _OwnRow:
    totals: Totals
    window: Window
    running: int = 0
    reserved_tokens: int = 0
    is_forgotten: bool = False
    untold: Unheard = NOTHING_UNHEARD
    in_transit: list[tuple[float, Unheard]] = field(default_factory=list)  # by time told; of the last TRANSIT_S


class OwnCounters:
    """What this node counts for itself, and which of it is told next.

    Told first is what changed, in the order it did; then, while there is room, what was told longest ago of all that
    is in use. So each of K keys in use is told every K / (rows a section) publications, whatever others do."""

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.sections_told = 0  # those that say something
        self._sequence = 0
        self._rows: dict[str, _OwnRow] = {}
        self._changed: OrderedDict[str, None] = OrderedDict()  # in the order of the first change not told
        self._told: OrderedDict[str, None] = OrderedDict()  # in use, nothing new, in the order of telling

    def begin(self, key: str, reserved_tokens: int, now: float) -> None:
        """One request more, running from now on. Raises ValueError at OWN_KEYS_MAX keys; nothing is counted then."""
        row = self._row(key)
        row.running += 1
        row.reserved_tokens += reserved_tokens
        row.untold = row.untold.plus(Unheard(1, reserved_tokens))
        self._add(key, row, Totals(requests=1), now)

    def count(
        self, key: str, prompt_tokens: int, completion_tokens: int, now: float, *, released_tokens: int = 0
    ) -> None:
        """Tokens of a request, while it runs or at its end. released_tokens: of what was reserved for it, what these no
        longer need; end() then gives back so much less. Raises ValueError as begin()."""
        row = self._row(key)
        assert row.reserved_tokens >= released_tokens
        row.reserved_tokens -= released_tokens
        self._add(key, row, Totals(0, prompt_tokens, completion_tokens), now)

    def end(self, key: str, reserved_tokens: int) -> None:
        """A request of whose reservation so much is left is over."""
        row = self._rows[key]
        assert row.running > 0
        assert row.reserved_tokens >= reserved_tokens
        row.running -= 1
        row.reserved_tokens -= reserved_tokens
        self._change(key)
        if row.is_forgotten:
            self.forget(key)

    def used(self, key: str, now: float) -> Used:
        row = self._rows.get(key)
        if row is None:
            return Used()
        row.window.expire(now)
        return Used(row.window.requests, row.window.tokens, row.running, row.reserved_tokens)

    def unheard(self, key: str, now: float) -> Unheard:
        row = self._rows.get(key)
        if row is None:
            return NOTHING_UNHEARD
        _arrive(row, now)
        unheard = row.untold
        for _, begun in row.in_transit:
            unheard = unheard.plus(begun)
        return unheard

    def expiries(self, key: str) -> Iterator[tuple[float, int, int]]:
        """Of what this node used; see Window."""
        row = self._rows.get(key)
        return row.window.expiries() if row else iter(())

    def last_expiry(self, key: str) -> float | None:
        """Of what this node used; see Window."""
        row = self._rows.get(key)
        return row.window.last_expiry if row else None

    def totals(self) -> Iterator[tuple[str, Totals]]:
        """Of this generation, by key."""
        return ((key, row.totals) for key, row in self._rows.items())

    def forget(self, key: str) -> None:
        """A key that never works again: dropped as soon as nothing runs. Never one that may come back: it would count
        from 0, which receivers take for old news."""
        row = self._rows.get(key)
        if row is None:
            return
        if row.running:
            row.is_forgotten = True
            return
        del self._rows[key]
        self._changed.pop(key, None)
        self._told.pop(key, None)

    def renew(self, generation: int) -> None:
        """Peers remember a later generation of this node than it knew. What it counted so far is told again under the
        new one: who had heard of it counts it twice, but nobody misses it."""
        assert generation > self.generation
        self.generation = generation
        self._changed.update(dict.fromkeys(self._rows))
        self._told.clear()

    @property
    def untold_count(self) -> int:
        """Keys that changed since they were told last: while there are any, another section says something new."""
        return len(self._changed)

    def section(self, now: float, bytes_max: int = USAGE_BYTES_MAX) -> bytes:
        """The next section to publish: as many keys as fit. Empty bytes where no key is in use."""
        self._sequence += 1
        parts = [encode_head(self.generation, self._sequence)]
        told: list[str] = []
        room_bytes = bytes_max - len(parts[0])
        for key in [*self._next_keys(now)]:
            report = encode_report(self._report(key, now))
            if len(report) > room_bytes or len(told) == SECTION_ROWS_MAX:
                break
            room_bytes -= len(report)
            parts.append(report)
            told.append(key)
        for key in told:
            row = self._rows[key]
            _arrive(row, now)
            if row.untold != NOTHING_UNHEARD:
                row.in_transit.append((now, row.untold))
                row.untold = NOTHING_UNHEARD
            self._changed.pop(key, None)
            self._told[key] = None
            self._told.move_to_end(key)
        self.sections_told += bool(told)
        return b"".join(parts) if told else b""

    def _next_keys(self, now: float) -> Iterator[str]:
        """At most SECTION_ROWS_MAX + 1 keys; those told before that are no longer in use are dropped on the way."""
        chosen = 0
        for key in self._changed:
            if chosen > SECTION_ROWS_MAX:
                return
            chosen += 1
            yield key
        idle = []
        for key in self._told:
            if chosen > SECTION_ROWS_MAX:
                break
            used = self.used(key, now)
            if used == Used():
                idle.append(key)
                continue
            chosen += 1
            yield key
        for key in idle:
            del self._told[key]

    def _row(self, key: str) -> _OwnRow:
        row = self._rows.get(key)
        if row is None:
            if not 0 < len(key.encode()) <= KEY_BYTES_MAX:
                raise ValueError(f"a key of {len(key.encode())} bytes is not between 1 and {KEY_BYTES_MAX}")
            if len(self._rows) >= OWN_KEYS_MAX:
                raise ValueError(f"usage of {OWN_KEYS_MAX} keys is counted already; forget() those that are revoked")
            row = self._rows[key] = _OwnRow(NO_TOTALS, Window(FINE_BUCKET_S))
        return row

    def _add(self, key: str, row: _OwnRow, rise: Totals, now: float) -> None:
        row.totals = row.totals.plus(rise)
        row.window.add(rise.requests, rise.tokens, now)
        self._change(key)

    def _change(self, key: str) -> None:
        self._told.pop(key, None)
        self._changed[key] = None

    def _report(self, key: str, now: float) -> Report:
        row = self._rows[key]
        row.window.expire(now)
        return Report(key, row.totals, row.running, row.reserved_tokens, row.window.requests, row.window.tokens)


def _arrive(row: _OwnRow, now: float) -> None:
    """Let go what was told long enough ago."""
    row.in_transit = [(told_at, begun) for told_at, begun in row.in_transit if now - told_at < TRANSIT_S]
