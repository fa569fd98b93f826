"""Streams to and from every peer: one TCP link per peer and direction, dialled when first needed.

The node that opens a stream dials; the streams its peers open arrive on links that they dialled. Requests and events
are opaque here.
"""

from __future__ import annotations

import logging
import random
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import trio

from mesh.errors import HandshakeRefused, MalformedFrame, PeerUnavailable, SealRejected
from mesh.link import Link
from mesh.link_connection import ForwarderConfig, LinkConnection
from mesh.link_handshake import OTHER_NODE, Role
from mesh.seal import Keyring
from mesh.streams import (
    IncomingStream,
    OpenerLink,
    OutgoingStream,
    RemoteError,
    ServingLink,
    StreamCounts,
    StreamRefused,
)
from mesh.view import Address

__all__ = [
    "Forwarder",
    "ForwarderConfig",
    "ForwarderStatistics",
    "IncomingStream",
    "OutgoingStream",
    "RemoteError",
    "StreamRefused",
]

logger = logging.getLogger(__name__)

# Strangers may hold this many connections at once, each for the handshake timeout and 1 KiB.
HANDSHAKES_MAX = 64
# Peers dial one link each; far more than a mesh that forwards to its nearest candidates needs.
ACCEPTED_LINKS_MAX = 1024
# Addresses whose failed dials are remembered. Forgetting one costs a dial that fails again.
BACKOFFS_MAX = 1024
# After a key was removed, what is under way under it may still arrive for this long; then the links under it close.
REKEY_GRACE_S = 2.0
# Every label of ForwarderStatistics.rejected, so that a scrape shows each from the start.
REJECTIONS = (
    "malformed", "tampered", "unknown key", "wrong key", "other cluster", "protocol version", "fenced",
    "timeout", "gone", "too many",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ForwarderStatistics:
    """links, streams: now. The others are totals. rejected: handshakes and frames not accepted, by reason; no reason is
    missing. broken_links: ended without a goodbye."""

    links: int
    streams: int
    streams_opened: int
    streams_served: int
    cancels_sent: int
    cancels_received: int
    overflows: int
    broken_links: int
    frames_in: int
    frames_out: int
    bytes_in: int
    bytes_out: int
    rejected: Mapping[str, int]


@dataclass(slots=True)
class _Dial:
    """A dial in progress, shared by everybody who waits for it: then either link or error is set."""

    done: trio.Event = field(default_factory=trio.Event)
    link: OpenerLink | None = None
    error: PeerUnavailable | HandshakeRefused | None = None


@dataclass(frozen=True, slots=True)
class _Backoff:
    failures: int
    until: float


async def connect_tcp(address: Address) -> trio.abc.Stream:
    """trio sets TCP_NODELAY, so that a small frame does not wait for the one before. Raises OSError."""
    return await trio.open_tcp_stream(address.host, address.port)


class Forwarder:
    """Opens streams at peers and serves theirs, while run() runs.

    serve: called for every stream a peer opens, in a task of its own; see IncomingStream. load: this node's report, at
    most LOAD_BYTES_MAX; on_load(node_id, report): gets the peers'. on_peer_lost(node_id): an established link broke.
    These three must not raise. connect: how to reach an address. rng: for jitter alone.
    """

    def __init__(
        self,
        *,
        node_id: str,
        boot_id: bytes,
        keyring: Keyring,
        serve: Callable[[IncomingStream], Awaitable[None]],
        config: ForwarderConfig | None = None,
        load: Callable[[], bytes] | None = None,
        on_load: Callable[[str, bytes], None] | None = None,
        on_peer_lost: Callable[[str], None] | None = None,
        connect: Callable[[Address], Awaitable[trio.abc.Stream]] = connect_tcp,
        rng: random.Random | None = None,
    ) -> None:
        self._node_id = node_id
        self._boot_id = boot_id
        self._keyring = keyring
        self._serve = serve
        self._config = config or ForwarderConfig()
        self._load = load
        self._on_load = on_load
        self._on_peer_lost = on_peer_lost
        self._connect = connect
        self._rng = rng or random.Random()
        self._nursery: trio.Nursery | None = None
        self._dials: dict[tuple[str, Address], _Dial] = {}
        self._opened: dict[tuple[str, Address], OpenerLink] = {}
        self._serving: set[ServingLink] = set()
        self._backoffs: dict[tuple[str, Address], _Backoff] = {}
        self._handshakes: dict[LinkConnection, trio.CancelScope] = {}  # of strangers, oldest first
        self._counts = StreamCounts()
        self._rejected = Counter(dict.fromkeys(REJECTIONS, 0))
        self._broken_links = 0
        self._past = Counter(dict.fromkeys(("frames_in", "frames_out", "bytes_in", "bytes_out"), 0))

    async def run(
        self,
        listeners: Sequence[trio.abc.Listener[trio.abc.Stream]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept links and own every task of every link. Does not return; cancelling says goodbye on each link, closes
        all, and closes the listeners."""
        try:
            async with trio.open_nursery() as self._nursery:
                if listeners:
                    self._nursery.start_soon(trio.serve_listeners, self._accept, list(listeners))
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None

    async def open(self, node_id: str, address: Address, request: bytes) -> OutgoingStream:
        """Send `request` to the node, dialling it if there is no link. The answer's failures are raised by the stream.

        Raises PeerUnavailable when there is no link to be had, at once while the address is backed off; NoCapacity at
        the link's limit of streams; ValueError for a request above REQUEST_BYTES_MAX. Nothing stays open when it raises
        or is cancelled.
        """
        await trio.lowlevel.checkpoint()
        try:
            link = await self._link_to(node_id, address, is_patient=True)
        except HandshakeRefused as exc:
            raise PeerUnavailable(f"node {node_id} at {address} refused the link: {exc.reason}") from exc
        return link.open(request)

    async def ping(self, node_id: str, address: Address) -> float:
        """Seconds to the node and back over the link, dialling it if there is none; at most connect_timeout_s for each.

        Raises PeerUnavailable, HandshakeRefused.
        """
        link = await self._link_to(node_id, address, is_patient=False)
        with trio.move_on_after(self._config.connect_timeout_s):
            return await link.connection.ping()
        raise PeerUnavailable(f"node {node_id} did not answer within {self._config.connect_timeout_s:g} s")

    async def check_seed(self, address: Address) -> str:
        """Shake hands and part again; works without run(). Returns the id of the node at the address.

        Raises HandshakeRefused when it declines or does not hold the key, PeerUnavailable when it is not there.
        """
        connection = await self._dial(address, None)
        await connection.part()
        self._forget(connection)
        return connection.peer_node_id

    def keyring_changed(self) -> None:
        """Seal every link under the primary key from now on; its streams go on. Links whose peers still seal under a
        removed key after REKEY_GRACE_S are closed, and dialled again by whoever needs them."""
        for link in self._links():
            link.connection.rekey()
        if self._nursery is not None:
            self._nursery.start_soon(self._close_removed)

    async def _close_removed(self) -> None:
        await trio.sleep(REKEY_GRACE_S)
        for link in self._links():
            key_id = link.connection.link.opening_key_id
            if key_id not in self._keyring:
                link.connection.break_off(f"the peer seals under key {key_id.hex()}, which was removed here")

    def _links(self) -> list[OpenerLink | ServingLink]:
        return [*self._opened.values(), *self._serving]

    def statistics(self) -> ForwarderStatistics:
        links = self._links()
        connections = [link.connection for link in links]
        totals = {name: past + sum(getattr(c.link, name) for c in connections) for name, past in self._past.items()}
        return ForwarderStatistics(
            links=len(connections),
            streams=sum(link.stream_count for link in links),
            streams_opened=self._counts.opened,
            streams_served=self._counts.served,
            cancels_sent=self._counts.cancels_sent,
            cancels_received=self._counts.cancels_received,
            overflows=self._counts.overflows,
            broken_links=self._broken_links,
            rejected=dict(self._rejected),
            **totals,
        )

    # The links this node dials.

    async def _link_to(self, node_id: str, address: Address, *, is_patient: bool) -> OpenerLink:
        """The running link to a node, dialled now if there is none. is_patient: respect the backoff.

        Raises PeerUnavailable, HandshakeRefused.
        """
        if self._nursery is None:
            raise PeerUnavailable("this node's links are closed")
        key = (node_id, address)
        link = self._opened.get(key)
        if link is not None and link.connection.is_running:
            return link
        dial = self._dials.get(key)
        if dial is None:
            backoff = self._backoffs.get(key)
            wait_s = backoff.until - trio.current_time() if backoff else 0.0
            if is_patient and wait_s > 0:
                raise PeerUnavailable(f"node {node_id} at {address} could not be reached; next try in {wait_s:.1f} s")
            # In a task of the forwarder: whoever asked first may be cancelled while others wait too.
            dial = self._dials[key] = _Dial()
            self._nursery.start_soon(self._run_dialled, key, dial)
        await dial.done.wait()
        if dial.link is not None:
            return dial.link
        assert dial.error is not None
        raise type(dial.error)(*dial.error.args) from dial.error  # one exception for each who waited

    async def _run_dialled(self, key: tuple[str, Address], dial: _Dial) -> None:
        """Dial, then run the link until it ends."""
        node_id, address = key
        dial.error = PeerUnavailable("this node's links are closed")  # unless it gets further
        try:
            connection = await self._dial(address, node_id)
        except (PeerUnavailable, HandshakeRefused) as exc:
            dial.error = exc
            self._back_off(key)
            return
        else:
            dial.link = link = OpenerLink(connection, self._counts)
            self._opened[key] = link
            self._backoffs.pop(key, None)
        finally:
            del self._dials[key]
            dial.done.set()
        try:
            await link.run()
        finally:
            if self._opened.get(key) is link:
                del self._opened[key]
            self._note_end(connection)

    async def _dial(self, address: Address, node_id: str | None) -> LinkConnection:
        """A connection past its handshake. Raises PeerUnavailable, HandshakeRefused; nothing stays open then."""
        connection: LinkConnection | None = None
        is_done = False
        try:
            with trio.fail_after(self._config.connect_timeout_s):
                stream = await self._connect(address)
                connection = self._connection(stream, Role.INITIATOR, node_id)
                await connection.handshake()
            is_done = True
            return connection
        except trio.TooSlowError as exc:
            timeout_s = self._config.connect_timeout_s
            raise PeerUnavailable(f"{address} did not answer within {timeout_s:g} s") from exc
        except PeerUnavailable as exc:
            raise PeerUnavailable(f"{address}: {exc}") from exc
        except (OSError, UnicodeError) as exc:  # UnicodeError: a host name that cannot be one
            raise PeerUnavailable(f"{address} cannot be reached: {exc}") from exc
        except HandshakeRefused as exc:
            if exc.reason == OTHER_NODE:
                raise PeerUnavailable(f"another node than {node_id} answers at {address}") from exc
            raise
        except SealRejected as exc:
            self._rejected[exc.reason] += 1
            raise HandshakeRefused(exc.reason) from exc
        except MalformedFrame as exc:
            self._rejected["malformed"] += 1
            raise PeerUnavailable(f"{address} does not speak the peer link's protocol: {exc}") from exc
        finally:
            if connection is not None and not is_done:
                await connection.close()
                self._forget(connection)

    def _back_off(self, key: tuple[str, Address]) -> None:
        config = self._config
        before = self._backoffs.pop(key, None)
        failures = before.failures + 1 if before else 1
        longest_s = min(config.backoff_max_s, config.backoff_min_s * 2 ** min(failures - 1, 16))
        # Half of it is random: the nodes that lost a peer together do not all come back at once.
        until = trio.current_time() + longest_s * self._rng.uniform(0.5, 1.0)
        self._backoffs[key] = _Backoff(failures, until)
        if len(self._backoffs) > BACKOFFS_MAX:
            del self._backoffs[next(iter(self._backoffs))]

    # The links that peers dial.

    async def _accept(self, stream: trio.abc.Stream) -> None:
        if len(self._serving) >= ACCEPTED_LINKS_MAX:
            self._reject("too many")
            await trio.aclose_forcefully(stream)
            return
        if len(self._handshakes) >= HANDSHAKES_MAX:
            # The oldest has had its time: a peer needs milliseconds. So silent strangers do not keep peers out.
            self._handshakes.pop(next(iter(self._handshakes))).cancel()
        connection = self._connection(stream, Role.RESPONDER, None)
        if not await self._shake_hands(connection):
            return
        link = ServingLink(connection, self._counts, self._serve)
        self._serving.add(link)
        try:
            await link.run()
        finally:
            self._serving.discard(link)
            self._note_end(connection)

    async def _shake_hands(self, connection: LinkConnection) -> bool:
        """False when the peer was rejected; it is counted and the connection closed."""
        is_known = False
        try:
            with trio.fail_after(self._config.handshake_timeout_s) as scope:
                self._handshakes[connection] = scope
                await connection.handshake()
            is_known = True
        except trio.TooSlowError:
            self._reject("timeout" if connection in self._handshakes else "too many")
        except (HandshakeRefused, SealRejected) as exc:
            self._reject(exc.reason)
        except MalformedFrame:
            self._reject("malformed")
        except PeerUnavailable:
            self._reject("gone")
        finally:
            self._handshakes.pop(connection, None)
            if not is_known:
                await connection.close()
                self._forget(connection)
        return is_known

    def _reject(self, reason: str) -> None:
        """Count; tell at doubling counts, so that nobody can fill the log."""
        self._rejected[reason] += 1
        count = self._rejected[reason]
        if count & (count - 1) == 0:
            logger.warning("rejected a peer link", extra={"reason": reason, "count": count})

    # Both.

    def _connection(self, stream: trio.abc.Stream, role: Role, expected_node_id: str | None) -> LinkConnection:
        link = Link(
            role,
            keyring=self._keyring,
            node_id=self._node_id,
            boot_id=self._boot_id,
            nonce=secrets.token_bytes(32),
            expected_node_id=expected_node_id,
        )
        return LinkConnection(stream, link, self._config, load=self._load, on_load=self._on_load)

    def _note_end(self, connection: LinkConnection) -> None:
        self._forget(connection)
        if connection.rejection is not None:
            self._rejected[connection.rejection] += 1
        if connection.fault is None:
            return
        self._broken_links += 1
        logger.warning("a peer link broke", extra={"peer": connection.peer_node_id, "reason": connection.fault})
        if self._on_peer_lost is not None:
            self._on_peer_lost(connection.peer_node_id)

    def _forget(self, connection: LinkConnection) -> None:
        """Keep a past link's totals."""
        for name in self._past:
            self._past[name] += getattr(connection.link, name)
