"""Keeps every node's replica of the API keys equal: what is edited here goes to all live members at once, and whoever
publishes another digest than this node's own is compared with.

Each node publishes its digest in its profile, which gossip tells within a second and again whenever parts of a mesh
meet. So a node that was away learns what it missed as soon as it is seen, and nothing is sent where all are equal.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Awaitable, Callable, Sequence

import trio

from mesh import replica_sync
from mesh.errors import MalformedDatagram, MeshError
from mesh.replica import Record
from mesh.view import ClusterView, MemberStatus, MemberView
from nodes.durable_replica import DurableReplica
from nodes.store import StoreFailed

logger = logging.getLogger(__name__)

# How often the published digests are looked at.
WATCH_INTERVAL_S = 0.1
# A digest may lag behind the records by one way of gossip; only one that differs for longer is news.
SETTLE_S = 0.3
# A peer is asked again so long after its comparison ended.
RETRY_S = 1.0
# So many are compared with at once, so that silent ones do not keep this node from those that answer.
COMPARISONS_MAX = 4
# For the first answer, which takes no work: who does not give it in time gives way to another.
FIRST_STEP_TIMEOUT_S = 1.0
PEER_TIMEOUT_S = 5.0
PEERS_AT_ONCE_MAX = 16
STEPS_MAX = 100_000  # of one comparison: more than the greatest replica takes

# Sends a request to a peer and returns its answer; raises MeshError.
Ask = Callable[[MemberView, bytes], Awaitable[bytes]]


class RecordSync:
    """view and publish are instant; publish hands gossip the digest, as hex, whenever it changes."""

    def __init__(
        self,
        durable: DurableReplica,
        *,
        view: Callable[[], ClusterView],
        ask: Ask,
        publish: Callable[[str], None],
        rng: random.Random,
    ) -> None:
        self._durable = durable
        self._view = view
        self._ask = ask
        self._publish = publish
        self._rng = rng
        self._differs_since: dict[str, float] = {}  # at most one a member
        self._compared_at: dict[str, float] = {}  # when the last comparison ended; at most one a member
        self._comparing: set[str] = set()
        self._published = ""
        self.has_compared = trio.Event()  # with some peer, to the end

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self._publish_digest()
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                await trio.sleep(WATCH_INTERVAL_S)
                self._publish_digest()
                due = self._peers_due(trio.current_time())
                for peer in due[: COMPARISONS_MAX - len(self._comparing)]:
                    self._comparing.add(peer.node_id)
                    nursery.start_soon(self._compare, peer)

    async def commit(self, drafts: Sequence[Record]) -> dict[str, str]:
        """Make edits: on this node's disk, then told to every live member. Returns the members that did not take them
        in time, with the reason; they get them by comparison. Raises StoreFailed, and nothing was changed then."""
        changed = await self._durable.commit(drafts)
        self._publish_digest()
        failed: dict[str, str] = {}
        if not changed:
            return failed
        request = replica_sync.give(changed)
        limiter = trio.CapacityLimiter(PEERS_AT_ONCE_MAX)

        async def tell(member: MemberView) -> None:
            async with limiter:
                failed[member.node_id] = f"no answer within {PEER_TIMEOUT_S:g} s"
                with trio.move_on_after(PEER_TIMEOUT_S):
                    try:
                        await self._ask(member, request)
                        del failed[member.node_id]
                    except MeshError as exc:
                        failed[member.node_id] = str(exc)

        async with trio.open_nursery() as nursery:
            for member in self._peers():
                nursery.start_soon(tell, member)
        return failed

    async def answer(self, request: bytes) -> bytes:
        """What a peer asks. Raises MalformedDatagram."""
        answer = replica_sync.answer(self._durable.replica, request)
        await self._keep(answer.changed)
        return answer.message

    async def _compare(self, peer: MemberView) -> None:
        asker = replica_sync.Asker(self._durable.replica)
        request: bytes | None = asker.first()
        try:
            for step_index in range(STEPS_MAX):
                if request is None:
                    break
                with trio.fail_after(PEER_TIMEOUT_S if step_index else FIRST_STEP_TIMEOUT_S):
                    message = await self._ask(peer, request)
                step = asker.receive(message)
                await self._keep(step.changed)
                request = step.request
        except (MeshError, MalformedDatagram, trio.TooSlowError) as exc:
            logger.info(
                "keys could not be compared with a peer", extra={"peer": peer.node_id, "error.message": str(exc)}
            )
            return
        finally:
            self._comparing.discard(peer.node_id)
            self._compared_at[peer.node_id] = trio.current_time()
        self.has_compared.set()
        self._differs_since.pop(peer.node_id, None)

    async def _keep(self, changed: Sequence[Record]) -> None:
        if not changed:
            return
        try:
            await self._durable.keep(changed)
        except StoreFailed as exc:  # they hold in memory, and the next change tries to keep them again
            logger.error("what peers say of keys cannot be kept", extra={"error.message": str(exc)})
        self._publish_digest()

    def _publish_digest(self) -> None:
        digest = self._durable.replica.digest().hex()
        if digest != self._published:
            self._published = digest
            self._publish(digest)

    def _peers_due(self, now: float) -> list[MemberView]:
        """Those whose digest has been another one for long enough: who answers probes first, then who was asked longest
        ago, else at random."""
        peers = self._peers()
        differing = [peer for peer in peers if peer.profile.records_digest not in ("", self._published)]
        if any(peer.profile.records_digest == self._published for peer in peers):
            self.has_compared.set()  # by its digest; one whose profile was not heard yet has none
        self._differs_since = {peer.node_id: self._differs_since.get(peer.node_id, now) for peer in differing}
        self._compared_at = {name: at for name, at in self._compared_at.items() if name in self._differs_since}
        due = [
            peer
            for peer in differing
            if now - self._differs_since[peer.node_id] >= SETTLE_S
            and peer.node_id not in self._comparing
            and now - self._compared_at.get(peer.node_id, -math.inf) >= RETRY_S
        ]
        self._rng.shuffle(due)
        due.sort(
            key=lambda peer: (peer.status is not MemberStatus.ALIVE, self._compared_at.get(peer.node_id, -math.inf))
        )
        return due

    def _peers(self) -> list[MemberView]:
        return [
            member
            for member in self._view().members.values()
            if not member.is_self and member.status in (MemberStatus.ALIVE, MemberStatus.SUSPECT)
        ]
