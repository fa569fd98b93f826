"""What each key used, by model and day: counted here, on disk each second, and told to every other node.

A row is what one life of one node counted of one key and model on one day, so rows only rise and merge by their
maximum, whoever brings them. Every node keeps everybody's, so that nothing is lost with a node.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgpack
import trio

from mesh.counters_wire import NO_TOTALS, TOTAL_MAX, Totals
from mesh.errors import MalformedDatagram, MeshError, PeerUnavailable
from mesh.packed_arrays import field, items, unpack_array
from mesh.view import ClusterView, MemberStatus, MemberView
from mesh.wire import GENERATION_MAX, NODE_ID_BYTES_MAX, count, text
from nodes.store import DAY_MAX, TEXT_BYTES_MAX, DayDigest, Store, StoreFailed, UsageRow

logger = logging.getLogger(__name__)

DAY_S = 86_400
# What a SIGKILL may lose, at most.
FLUSH_INTERVAL_S = 1.0
# Rows counted here that are not on disk yet, while the disk does not take them; beyond it new ones are not counted.
ROWS_MAX = 65_536
# How often this node looks for members that have appeared.
LOOK_INTERVAL_S = 1.0
# How often this node's rows are compared with some peer's; and with each one that appears.
COMPARE_INTERVAL_S = 60.0
# Days that are kept, and compared: older ones are deleted, and not taken from peers either.
DAYS_KEPT = 400
ROWS_PER_MESSAGE = 256
MESSAGE_BYTES_MAX = 256 * 1024
PEER_TIMEOUT_S = 5.0
PEERS_AT_ONCE_MAX = 16

_GIVE, _DIGESTS, _FETCH = range(1, 4)

# Sends a request to a peer and returns its answer; raises MeshError.
Ask = Callable[[MemberView, bytes], Awaitable[bytes]]


class UsageLog:
    """view is instant; wall_clock: seconds since 1970."""

    def __init__(
        self,
        store: Store,
        *,
        node_id: str,
        generation: Callable[[], int],
        view: Callable[[], ClusterView],
        ask: Ask,
        wall_clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self._store = store
        self._node_id = node_id
        self._generation = generation
        self._view = view
        self._ask = ask
        self._wall_clock = wall_clock
        self._rng = rng
        self._rows: dict[tuple[int, str, str, str, int], Totals] = {}  # of today, and of whatever is not on disk
        self._changed: set[tuple[int, str, str, str, int]] = set()
        self._is_overflowing = False
        self._is_failing = False  # the disk took no rows at the last try
        self._telling: set[str] = set()  # members that are being told: at most one telling each
        self._telling_limiter = trio.CapacityLimiter(PEERS_AT_ONCE_MAX)

    def count(self, key: str, model: str, rise: Totals) -> None:
        """Instant."""
        identity = (self._today(), key, model, self._node_id, self._generation())
        if identity not in self._rows and len(self._rows) >= ROWS_MAX:
            if not self._is_overflowing:
                logger.error("usage is not counted: too many rows wait for the disk")
            self._is_overflowing = True
            return
        if len(self._rows) < ROWS_MAX:
            self._is_overflowing = False
        self._rows[identity] = self._rows.get(identity, NO_TOTALS).plus(rise)
        self._changed.add(identity)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; then what was counted is put on disk once more. No peer keeps the disk waiting."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._delete_old)
                nursery.start_soon(self._compare_with_peers)
                task_status.started()
                while True:
                    await trio.sleep(FLUSH_INTERVAL_S)
                    rows = await self.flush()
                    if not rows:
                        continue
                    for peer in self._peers():
                        if peer.node_id not in self._telling:  # else it fetches these rows when it compares
                            self._telling.add(peer.node_id)
                            nursery.start_soon(self._tell, peer, rows)
        finally:
            with trio.CancelScope(shield=True):  # bounded by the store's own busy timeout
                await self.flush()

    async def flush(self) -> list[UsageRow]:
        """On disk what was counted. Returns what is new there; nothing where the disk does not take it."""
        rows = self._take()
        return rows if await self._put(rows) else []

    async def answer(self, request: bytes) -> bytes:
        """What a peer asks. Raises MalformedDatagram, and PeerUnavailable where this node's disk does not answer."""
        try:
            return await self._answer(unpack_array(request, MESSAGE_BYTES_MAX))
        except StoreFailed as exc:
            logger.error("usage cannot be read", extra={"error.message": str(exc)})
            raise PeerUnavailable("this node cannot read its usage; its log says why") from exc

    async def _answer(self, fields: list[Any]) -> bytes:
        kind = count(field(fields, 0))
        if kind == _GIVE:
            first_day = self._first_day_kept()
            await self._put([row for row in _rows(fields, 1) if row.day >= first_day])
            return _pack([])
        if kind == _DIGESTS:
            digests = await self._store.usage_digests(self._first_day_kept())
            return _pack([[digest.day, digest.rows, digest.requests, digest.tokens] for digest in digests])
        if kind == _FETCH:
            day, after = count(field(fields, 1), DAY_MAX), field(fields, 2)
            rows = await self._store.usage_rows(day, None if after is None else _position(after), ROWS_PER_MESSAGE)
            return _pack([[_fields(row) for row in rows]])
        raise MalformedDatagram(f"{kind} is no question about usage")

    async def _tell(self, peer: MemberView, rows: Sequence[UsageRow]) -> None:
        try:
            async with self._telling_limiter:
                with trio.fail_after(PEER_TIMEOUT_S):
                    for at in range(0, len(rows), ROWS_PER_MESSAGE):
                        told = rows[at : at + ROWS_PER_MESSAGE]
                        await self._ask(peer, _pack([_GIVE, [_fields(row) for row in told]]))
        except (MeshError, trio.TooSlowError) as exc:  # it asks for them when it is back
            logger.debug("usage was not told", extra={"peer": peer.node_id, "error.message": str(exc)})
        finally:
            self._telling.discard(peer.node_id)

    async def _delete_old(self) -> None:
        while True:
            try:
                await self._store.delete_usage(self._first_day_kept())
            except StoreFailed as exc:
                logger.error("old usage cannot be deleted", extra={"error.message": str(exc)})
            await trio.sleep(DAY_S)

    async def _compare_with_peers(self) -> None:
        """With each that appears, and now and then with some; one after the other."""
        compare_at = trio.current_time() + self._rng.random() * COMPARE_INTERVAL_S
        known: set[str] = set()  # members that were there at the last look
        while True:
            await trio.sleep(LOOK_INTERVAL_S)
            peers = self._peers()
            appeared = [peer for peer in peers if peer.node_id not in known]
            known = {peer.node_id for peer in peers}
            if not appeared and peers and trio.current_time() >= compare_at:
                compare_at = trio.current_time() + COMPARE_INTERVAL_S
                appeared = [self._rng.choice(peers)]
            for peer in appeared:
                await self._fetch_from(peer)

    async def _fetch_from(self, peer: MemberView) -> None:
        """What it has and this node has not. The peer fetches what it lacks itself, at its own time."""
        try:
            with trio.fail_after(PEER_TIMEOUT_S):
                answer = unpack_array(await self._ask(peer, _pack([_DIGESTS])), MESSAGE_BYTES_MAX)
            own = {digest.day: digest for digest in await self._store.usage_digests(self._first_day_kept())}
            for row in answer:
                theirs = _digest(row)
                if theirs.day >= self._first_day_kept() and own.get(theirs.day) != theirs:
                    await self._fetch_day(peer, theirs.day)
        except StoreFailed as exc:
            logger.error("usage cannot be read", extra={"error.message": str(exc)})
        except (MeshError, MalformedDatagram, trio.TooSlowError) as exc:
            logger.info(
                "usage could not be compared with a peer", extra={"peer": peer.node_id, "error.message": str(exc)}
            )

    async def _fetch_day(self, peer: MemberView, day: int) -> None:
        after: tuple[str, str, str, int] | None = None
        while True:
            with trio.fail_after(PEER_TIMEOUT_S):
                rows = _rows(unpack_array(await self._ask(peer, _pack([_FETCH, day, after])), MESSAGE_BYTES_MAX), 0)
            await self._put(rows)
            if len(rows) < ROWS_PER_MESSAGE or (after is not None and rows[-1].identity[1:] <= after):
                return
            after = rows[-1].identity[1:]

    def _take(self) -> list[UsageRow]:
        rows = [UsageRow(*identity, self._rows[identity]) for identity in self._changed]
        self._changed = set()
        return rows

    async def _put(self, rows: Sequence[UsageRow]) -> bool:
        """False where the disk does not take them: own ones are tried again."""
        if not rows:
            return True
        try:
            await self._store.put(usage=rows)
        except StoreFailed as exc:
            if not self._is_failing:  # it is tried again each second
                logger.error("usage cannot be kept", extra={"error.message": str(exc)})
            self._is_failing = True
            self._changed.update(row.identity for row in rows if row.identity in self._rows)
            return False
        if self._is_failing:
            logger.info("usage is kept again")
        self._is_failing = False
        today = self._today()
        for row in rows:
            if row.day < today and row.identity not in self._changed:
                self._rows.pop(row.identity, None)
        return True

    def _first_day_kept(self) -> int:
        return max(0, self._today() - DAYS_KEPT)

    def _today(self) -> int:
        return int(self._wall_clock() // DAY_S)

    def _peers(self) -> list[MemberView]:
        return [
            member
            for member in self._view().members.values()
            if not member.is_self and member.status is MemberStatus.ALIVE and member.profile.records_digest
        ]


def _fields(row: UsageRow) -> list[object]:
    totals = row.totals
    return [*row.identity, totals.requests, totals.prompt_tokens, totals.completion_tokens]


def _rows(fields: Sequence[Any], index: int) -> list[UsageRow]:
    """Raises MalformedDatagram."""
    return [_row(row) for row in items(fields, index, ROWS_PER_MESSAGE)]


def _row(fields: Any) -> UsageRow:
    if not isinstance(fields, list) or len(fields) < 8:
        raise MalformedDatagram("a row of usage has 8 fields")
    return UsageRow(
        count(fields[0], DAY_MAX),
        text(fields[1], TEXT_BYTES_MAX),
        _text(fields[2]),
        text(fields[3], NODE_ID_BYTES_MAX),
        count(fields[4], GENERATION_MAX),
        Totals(*(count(value, TOTAL_MAX) for value in fields[5:8])),
    )


def _digest(fields: Any) -> DayDigest:
    if not isinstance(fields, list) or len(fields) < 4:
        raise MalformedDatagram("a digest of a day has 4 fields")
    return DayDigest(count(fields[0], DAY_MAX), *(count(value) for value in fields[1:4]))


def _position(fields: Any) -> tuple[str, str, str, int]:
    if not isinstance(fields, list) or len(fields) != 4:
        raise MalformedDatagram("a position among the rows of a day has 4 fields")
    return (text(fields[0], TEXT_BYTES_MAX), _text(fields[1]), text(fields[2], NODE_ID_BYTES_MAX), count(fields[3]))


def _text(value: Any) -> str:
    """A model may have no name, where it was never known."""
    return "" if value == "" else text(value, TEXT_BYTES_MAX)


def _pack(fields: Sequence[object]) -> bytes:
    message: bytes = msgpack.packb(fields)
    return message
