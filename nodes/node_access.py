"""Keys, limits and usage of one node, put together: the replica and its store, what keeps them equal to the peers', and
the gate in front of the API."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

import trio

from mesh.counters import PeerCounters
from mesh.errors import MalformedDatagram
from mesh.forwarder import Forwarder
from mesh.own_counters import OwnCounters
from mesh.replica import Record, Replica
from mesh.view import ClusterView, MemberStatus, MemberView
from nodes import peer_questions
from nodes.access.gate import Gate
from nodes.access.key_admin import KeyAdmin
from nodes.access.key_book import KeyBook
from nodes.access.limits import Limiter, LostNodes
from nodes.access.record_sync import RecordSync
from nodes.access.usage import UsageLog
from nodes.durable_replica import DurableReplica
from nodes.figures import UsageFigures
from nodes.peer_questions import Answerer
from nodes.store import Store

# How long a node with seeds that has no keys waits for some peer's before it serves without: longer than it takes to
# find that another node has its name, which is told nothing by the mesh and would be open.
RECORDS_WAIT_S = 10.0
_RECORDS = "records"
_USAGE = "usage"


class NodeAccess:
    """gate and key_admin: for the API. answerers: of peers' questions, by subject."""

    def __init__(
        self,
        *,
        node_id: str,
        generation: int,
        store: Store,
        records: Sequence[Record],
        own_counters: OwnCounters,
        forwarder: Forwarder,
        view: Callable[[], ClusterView],
        publish: Callable[[str], None],
        usage_changed: Callable[[], None],
        is_open: bool,
        has_seeds: bool,
        hold_s: float,
    ) -> None:
        """records: those of the store. publish: hands gossip the digest of the records. is_open, usage_changed: the
        gate's. hold_s: LostNodes'."""
        self._generation = generation
        self._publish = publish
        self._has_seeds = has_seeds
        self._own_counters = own_counters
        self._peer_counters = PeerCounters()
        self._usage_heard = 0
        self._known = trio.Event()
        replica = Replica(node_id, generation, records)
        rng = random.Random()
        self._sync = RecordSync(
            DurableReplica(replica, store),
            view=view,
            ask=partial(peer_questions.ask, forwarder, _RECORDS),
            publish=self._records_changed,
            rng=rng,
        )
        self._usage = UsageLog(
            store,
            node_id=node_id,
            generation=lambda: self._generation,
            view=view,
            ask=partial(peer_questions.ask, forwarder, _USAGE),
            wall_clock=time.time,
            rng=rng,
        )
        self.answerers: Mapping[str, Answerer] = {_RECORDS: self._sync.answer, _USAGE: self._usage.answer}
        lost = LostNodes(hold_s)
        self._book = KeyBook(replica)
        self.gate = Gate(
            self._book,
            Limiter(own_counters, self._peer_counters, lambda now: lost.shares(view(), now)),
            own_counters,
            self._usage,
            is_open=is_open,
            wait_known=self._known.wait,
            usage_changed=usage_changed,
            wall_clock=time.time,
        )
        self.key_admin = KeyAdmin(self._book, self._sync, self.gate, store, wall_clock=time.time)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._sync.run)
            await nursery.start(self._usage.run)
            nursery.start_soon(self._learn)
            task_status.started()

    async def wait_known(self) -> None:
        """Until this node knows its mesh's keys as well as some peer does: at once where it has some, or is the first,
        and not for ever where its seeds are silent."""
        await self._known.wait()

    def hear_usage(self, node_id: str, section: bytes) -> None:
        """What a peer published."""
        self._usage_heard += 1
        with suppress(MalformedDatagram):  # of a later version: limits then do not see what it tells
            self._peer_counters.receive(node_id, section, trio.current_time())

    def member_changed(self, member: MemberView) -> None:
        """What gossip says of it now. Instant."""
        if member.status in (MemberStatus.DEAD, MemberStatus.LEFT):
            self._peer_counters.gone(member.node_id)

    def figures(self) -> UsageFigures:
        return UsageFigures(self._own_counters.sections_told, self._usage_heard, self._peer_counters.row_count)

    def renew(self, generation: int) -> None:
        """This node's generation is another one than it thought."""
        self._generation = generation
        self._own_counters.renew(generation)

    def _records_changed(self, digest: str) -> None:
        self._publish(digest)
        self.gate.forget_revoked()

    async def _learn(self) -> None:
        if self._has_seeds and not self._book.was_ever_used:
            with trio.move_on_after(RECORDS_WAIT_S):
                await self._sync.has_compared.wait()
        self._known.set()
