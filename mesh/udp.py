"""The UDP socket of a node: drains it, lets a Gossip decide, performs the effects. Decides nothing of the protocol."""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import assert_never

import trio

from mesh.errors import MeshError
from mesh.gossip import (
    DuplicateNode,
    Effect,
    ExchangeState,
    Fenced,
    Gossip,
    MemberChanged,
    PingLink,
    SeedUnanswered,
    SendDatagram,
    UsageHeard,
)
from mesh.view import Address, MemberStatus, NodeLoad, NodeProfile
from mesh.wire import DATAGRAM_BYTES_MAX

logger = logging.getLogger(__name__)

# Read at one wakeup before timers get their turn; wakeups cost more than datagrams, so many at a time.
DRAIN_MAX = 64
# One more than is allowed, so that too long a datagram is seen to be, and dropped by the core.
READ_BYTES = DATAGRAM_BYTES_MAX + 1
# A peer link that answers later than this is of no use as evidence: the probe is over.
LINK_PING_TIMEOUT_S = 2.0
# The same for an answer to a question; another peer is asked then.
LINK_EXCHANGE_TIMEOUT_S = 8.0
# Seeds given by name are looked up each time they are called; a lookup slower than this is given up.
RESOLVE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class SocketStatistics:
    """Counts since the start. send_errors: datagrams the kernel refused, a lost one to the protocol."""

    datagrams_received: int
    datagrams_sent: int
    send_errors: int
    wakeups: int


def bind(host: str, port: int) -> socket.socket:
    """A UDP socket for GossipSocket; port 0 takes a free one. Raises OSError."""
    family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.bind(target)
    except OSError:
        bound.close()
        raise
    return bound


def address_of(bound: socket.socket) -> Address:
    """Where a bound socket is."""
    host, port = bound.getsockname()[:2]
    return Address(host, port)


class GossipSocket:
    """Runs one Gossip on one bound UDP socket, which stays the caller's to close.

    ping_link: pings a member over its peer link; returning is an answer, MeshError or OSError is none. ask_link: sends
    it a question and returns its answer; fails likewise. on_change: told of each change of membership, after it was
    logged; on_usage: of a member's usage section; on_fenced: that another process has this node's name;
    on_seed_unanswered: of a seed that is silent. None of these four may block.
    Use set_load, set_profile, set_bulk and link_failed here, not on the Gossip, so that urgent news leaves at once."""

    def __init__(
        self,
        gossip: Gossip,
        bound: socket.socket,
        *,
        ping_link: Callable[[str, Address], Awaitable[object]],
        ask_link: Callable[[str, Address, bytes], Awaitable[bytes]],
        on_fenced: Callable[[Address], None] | None = None,
        on_seed_unanswered: Callable[[Address], None] | None = None,
        on_change: Callable[[MemberChanged], None] | None = None,
        on_usage: Callable[[str, bytes], None] | None = None,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        bound.setblocking(False)
        self._gossip = gossip
        self._socket = bound
        self._ping_link = ping_link
        self._ask_link = ask_link
        self._on_fenced = on_fenced
        self._on_seed_unanswered = on_seed_unanswered
        self._on_change = on_change
        self._on_usage = on_usage
        self._clock = clock
        self._waiting: trio.CancelScope | None = None
        self._nursery: trio.Nursery | None = None
        self._resolving: set[Address] = set()  # at most one lookup a seed
        self._received = self._sent = self._send_errors = self._wakeups = 0

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Takes part in the mesh until cancelled. Does not leave it: call leave() first to do so."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                while True:
                    self._drain()
                    self._perform(self._gossip.tick(self._clock()))
                    await self._wait()
                    self._wakeups += 1
            finally:
                self._nursery = None

    async def _wait(self) -> None:
        """Until a datagram is there, a timer is due, or wake() is called."""
        with trio.CancelScope(deadline=self._deadline()) as self._waiting:
            await trio.lowlevel.wait_readable(self._socket)
        self._waiting = None

    def _deadline(self) -> float:
        due = self._gossip.next_wakeup()
        # The clock given may not be trio's, whose deadlines these are.
        return trio.current_time() + max(0.0, due - self._clock()) if math.isfinite(due) else math.inf

    def wake(self) -> None:
        """Look again at what is due: something was published, or told to the Gossip, from outside."""
        if self._waiting is not None:
            self._waiting.deadline = min(self._waiting.deadline, self._deadline())

    def set_load(self, load: NodeLoad) -> None:
        """Gossip.set_load, now."""
        self._gossip.set_load(load, self._clock())
        self.wake()

    def set_profile(self, profile: NodeProfile) -> None:
        """Gossip.set_profile, now."""
        self._gossip.set_profile(profile, self._clock())
        self.wake()

    def set_bulk(self, bulk: bytes) -> None:
        """Gossip.set_bulk, now."""
        self._gossip.set_bulk(bulk, self._clock())
        self.wake()

    def usage_changed(self) -> None:
        """Gossip.usage_changed, now."""
        self._gossip.usage_changed(self._clock())
        self.wake()

    def link_failed(self, node_id: str) -> None:
        """Gossip.link_failed, now: a forward failed or a peer link broke."""
        self._gossip.link_failed(node_id, self._clock())
        self.wake()

    def add_seed(self, address: Address) -> None:
        """Gossip.add_seed, now."""
        self._gossip.add_seed(address, self._clock())
        self.wake()

    def forget(self, node_id: str) -> bool:
        """Gossip.forget, now."""
        is_forgotten = self._gossip.forget(node_id, self._clock())
        self.wake()
        return is_forgotten

    def leave(self) -> None:
        """Say farewell, at once and without waiting. run() stays idle from then on; cancel it."""
        self._perform(self._gossip.leave(self._clock()))

    def statistics(self) -> SocketStatistics:
        return SocketStatistics(self._received, self._sent, self._send_errors, self._wakeups)

    def _drain(self) -> None:
        for _ in range(DRAIN_MAX):
            try:
                data, source = self._socket.recvfrom(READ_BYTES)
            except BlockingIOError:
                return
            except ConnectionError:
                continue  # some systems report here that an earlier datagram found nobody
            self._received += 1
            self._perform(self._gossip.receive(data, Address(source[0], source[1]), self._clock()))

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case SendDatagram(address, data):
                    self._send(address, data)
                case MemberChanged():
                    _log_change(effect)
                    if self._on_change is not None:
                        self._on_change(effect)
                case UsageHeard(node_id, section):
                    if self._on_usage is not None:
                        self._on_usage(node_id, section)
                case PingLink(node_id, address):
                    if self._nursery is not None:
                        self._nursery.start_soon(self._ping, node_id, address)
                case ExchangeState(node_id, address, question):
                    if self._nursery is not None:
                        self._nursery.start_soon(self._exchange, node_id, address, question)
                case Fenced(address):
                    if self._on_fenced is not None:
                        self._on_fenced(address)
                case SeedUnanswered():
                    if self._on_seed_unanswered is not None:
                        self._on_seed_unanswered(effect.address)
                    _log_seed(effect)
                case DuplicateNode(node_id, address):
                    logger.error(
                        "two processes use one name: give each node a --name of its own",
                        extra={"peer": node_id, "address": str(address)},
                    )
                case _:
                    assert_never(effect)

    def _send(self, address: Address, data: bytes) -> None:
        if not _is_numeric(address.host):
            if self._nursery is not None and address not in self._resolving:
                self._resolving.add(address)
                self._nursery.start_soon(self._resolve_and_send, address, data)
            return
        try:
            self._socket.sendto(data, (address.host, address.port))
        except OSError:  # no route, no buffer, refused: lost like any other datagram
            self._send_errors += 1
        else:
            self._sent += 1

    async def _resolve_and_send(self, address: Address, data: bytes) -> None:
        try:
            with trio.move_on_after(RESOLVE_TIMEOUT_S):
                found = await trio.socket.getaddrinfo(
                    address.host, address.port, family=self._socket.family, type=socket.SOCK_DGRAM
                )
                numeric = Address(str(found[0][4][0]), address.port)
                self._gossip.seed_found(address, numeric)
                self._send(numeric, data)
        except (OSError, UnicodeError):  # the name does not resolve: nobody answers, and the core says so
            self._send_errors += 1
        finally:
            self._resolving.discard(address)

    async def _ping(self, node_id: str, address: Address) -> None:
        with trio.move_on_after(LINK_PING_TIMEOUT_S):
            try:
                await self._ping_link(node_id, address)
            except (MeshError, OSError) as exc:
                logger.debug("no answer over the peer link", extra={"peer": node_id, "reason": str(exc)})
                return
            self._gossip.link_answered(node_id, self._clock())

    async def _exchange(self, node_id: str, address: Address, question: bytes) -> None:
        with trio.move_on_after(LINK_EXCHANGE_TIMEOUT_S):
            try:
                answer = await self._ask_link(node_id, address, question)
            except (MeshError, OSError) as exc:
                logger.debug("no answer over the peer link", extra={"peer": node_id, "reason": str(exc)})
            else:
                self._perform(self._gossip.take_exchange(node_id, answer, self._clock()))
                self.wake()
                return
        self._gossip.exchange_failed(node_id)


def _is_numeric(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _log_seed(silence: SeedUnanswered) -> None:
    facts = {"address": str(silence.address), "attempts": silence.attempts}
    if silence.is_lasting:
        logger.warning(
            "a seed does not answer: see that a node runs there, that --join names its mesh port, that the name "
            "resolves and UDP gets through; it is called on",
            extra=facts,
        )
    else:
        logger.info("a seed has not answered yet; it is called again", extra=facts)


def _log_change(change: MemberChanged) -> None:
    before, after = change.before, change.after
    facts: dict[str, object] = {"peer": after.node_id, "address": str(after.address)}
    if before is None:
        if after.status is MemberStatus.ALIVE:
            logger.info("a member joined", extra=facts)
        return
    is_restarted = after.generation != before.generation
    if after.status is before.status and not is_restarted:
        return
    silent = facts | {"silent_s": round(after.age_s, 1)}
    if after.status is MemberStatus.SUSPECT:
        logger.warning("a member is suspect: nothing is heard of it", extra=silent)
    elif after.status is MemberStatus.DEAD:
        logger.warning("a member is dead: nothing is heard of it", extra=silent)
    elif after.status is MemberStatus.LEFT:
        logger.info("a member left", extra=facts)
    elif is_restarted:
        logger.info("a member is back, restarted", extra=facts)
    else:
        logger.info("a member is back", extra=facts)
