"""Keys, limits and usage of one node that has no peers, without a disk: what tests of the API and the gate stand on."""

from __future__ import annotations

import random
from collections.abc import Callable

import trio

from mesh.counters import PeerCounters
from mesh.counters_wire import Totals
from mesh.own_counters import OwnCounters
from mesh.replica import Replica
from mesh.view import ClusterView
from nodes.access.api_key import KeySettings
from nodes.access.gate import Gate
from nodes.access.key_admin import KeyAdmin
from nodes.access.key_book import KeyBook
from nodes.access.limits import Limiter, Shares
from nodes.access.record_sync import RecordSync
from nodes.access.usage import UsageLog
from nodes.durable_replica import DurableReplica
from tests.unit.fake_peers import FakePeers
from tests.unit.memory_store import MemoryStore

DAY = 20_000
DAY_S = 86_400


class FakeAccess:
    """wall_time may be set. changes: how often usage was told to be news."""

    def __init__(
        self,
        *,
        is_open: bool = True,
        now: Callable[[], float] = trio.current_time,
        view: Callable[[], ClusterView] | None = None,
    ) -> None:
        self.wall_time = DAY * DAY_S + 100.0
        self.known = trio.Event()
        self.known.set()
        self.changes = 0
        self.store = MemoryStore()
        self.replica = Replica("a", 1)
        self.own, self.peers = OwnCounters(1), PeerCounters()
        members = FakePeers("a")
        self.book = KeyBook(self.replica)
        self.sync = RecordSync(
            DurableReplica(self.replica, self.store),  # type: ignore[arg-type]
            view=view or (lambda: members.view_of("a")),
            ask=members.asker_of("a"),
            publish=lambda digest: None,
            rng=random.Random(1),
        )
        self.usage = UsageLog(
            self.store,  # type: ignore[arg-type]
            node_id="a",
            generation=lambda: 1,
            view=lambda: members.view_of("a"),
            ask=members.asker_of("a"),
            wall_clock=lambda: self.wall_time,
            rng=random.Random(2),
        )
        self.gate = Gate(
            self.book,
            Limiter(self.own, self.peers, lambda now: Shares()),
            self.own,
            self.usage,
            is_open=is_open,
            wait_known=lambda: self.known.wait(),
            usage_changed=self._changed,
            wall_clock=lambda: self.wall_time,
            now=now,
        )
        self.admin = KeyAdmin(
            self.book,
            self.sync,
            self.gate,
            self.store,  # type: ignore[arg-type]
            wall_clock=lambda: self.wall_time,
        )

    def create(self, name: str = "alice", **settings: object) -> str:
        """The token."""
        made = self.book.create(KeySettings(name, **settings), self.wall_time)  # type: ignore[arg-type]
        self.replica.merge(made.drafts)
        return made.token

    async def used(self) -> dict[tuple[str, str], Totals]:
        """By key family and model."""
        await self.usage.flush()
        return {(s.key, s.model): s.totals for s in await self.store.usage_sums(0, 10**6)}

    def _changed(self) -> None:
        self.changes += 1
