"""One link at work: the trio tasks that read, write and keep alive what mesh/link.py decides.

A connection ends for one reason, kept in `fault`: a text when it broke, None when either end closed it on purpose.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import trio

from mesh.errors import HandshakeRefused, MalformedFrame, PeerUnavailable, SealRejected
from mesh.link import Link
from mesh.link_events import Established, EventsReceived, LinkClosed, LinkEvent, PongReceived
from mesh.link_handshake import Role

logger = logging.getLogger(__name__)

READ_BYTES = 64 * 1024
# Sent at one go: each such piece has the drain timeout for itself, so a slow line is no broken one.
WRITE_BYTES = 64 * 1024
# What may wait for one peer, unsent: four of the largest requests.
OUTGOING_BYTES_MAX = 32 * 1024 * 1024
# Beyond OUTGOING_BYTES_MAX only small frames are queued; a peer that makes us hold so many of them reads nothing.
OUTGOING_SLACK_BYTES = 4 * 1024 * 1024
# A node's load rides along this often; gossip carries it each second anyway.
LOAD_PERIOD_S = 0.1
GOODBYE_TIMEOUT_S = 0.5


@dataclass(frozen=True, slots=True)
class ForwarderConfig:
    """Times in seconds.

    connect_timeout_s: for connection and handshake together; what a dead candidate costs a request.
    handshake_timeout_s: what a stranger who says nothing gets. ping_interval_s: between pings while streams are open;
    pings_unanswered_max of them in a row break the link, so a hang is noticed after as many intervals or one more:
    1.5 to 2 s. Longer leaves the clients of a hung node waiting, shorter breaks links at stalls of a busy machine.
    drain_timeout_s: for a peer to take 64 KiB. idle_timeout_s: the initiator closes a link without streams after it,
    the responder after twice of it. backoff_min_s, backoff_max_s: pause after the first and after many failed dials,
    during which opening fails at once.
    """

    connect_timeout_s: float = 2.0
    handshake_timeout_s: float = 5.0
    ping_interval_s: float = 0.5
    pings_unanswered_max: int = 3
    drain_timeout_s: float = 10.0
    idle_timeout_s: float = 60.0
    backoff_min_s: float = 0.1
    backoff_max_s: float = 2.0


class LinkConnection:
    """Owns the byte stream and the Link on it. load: this node's report for the peer. on_load: gets the peer's."""

    def __init__(
        self,
        stream: trio.abc.Stream,
        link: Link,
        config: ForwarderConfig,
        *,
        load: Callable[[], bytes] | None,
        on_load: Callable[[str, bytes], None] | None,
    ) -> None:
        self.link = link
        self.fault: str | None = None
        self.rejection: str | None = None  # a label, when the fault is a frame that was not accepted
        self.peer_node_id = ""
        self.flush_count = 0  # grows with every write: tells what was queued before it from what came after
        self._stream = stream
        self._config = config
        self._load = load
        self._on_load = on_load
        self._load_due_at = 0.0
        self._early_events: list[LinkEvent] = []
        self.is_running = False  # False as soon as the end is decided; nothing is to be queued then
        self._nursery: trio.Nursery | None = None
        self._wakeup = trio.Event()
        self._is_awake = True
        self._writing_since: float | None = None  # when the piece being sent was begun; None between writes
        self._unanswered_pings = 0
        self._used_at = 0.0
        self._pings: dict[int, trio.Event] = {}

    @property
    def nursery(self) -> trio.Nursery:
        """For tasks that end with the link. Only while it runs."""
        assert self._nursery is not None
        return self._nursery

    @property
    def is_full(self) -> bool:
        return self.link.pending_bytes > OUTGOING_BYTES_MAX

    async def handshake(self) -> None:
        """Until the peer is known; the caller bounds the time, and closes the connection when this raises.

        Raises MalformedFrame, SealRejected, HandshakeRefused, or PeerUnavailable when the connection ends early.
        """
        try:
            while not self._early_events:
                await self._stream.send_all(self.link.data_to_send())
                data = await self._stream.receive_some(READ_BYTES)
                if not data:
                    raise PeerUnavailable("the connection ended during the handshake")
                self._early_events += self.link.receive(data)
        except trio.BrokenResourceError as exc:
            raise PeerUnavailable("the connection broke during the handshake") from exc
        except HandshakeRefused:
            await self._send_last_words()
            raise
        established = self._early_events.pop(0)
        assert isinstance(established, Established)
        self.peer_node_id = established.node_id

    async def run(self, handle: Callable[[LinkEvent], None]) -> None:
        """Returns when the link has ended, with its tasks gone and the stream closed; see `fault`.

        handle: gets every event about streams, in order, and must not raise. Cancelling says goodbye to the peer.
        """
        self._used_at = trio.current_time()
        self.is_running = True
        try:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._read, handle)
                self._nursery.start_soon(self._write)
                self._nursery.start_soon(self._keep_alive)
        finally:
            self.is_running = False
            for waiting in self._pings.values():
                waiting.set()
            if self.fault is None and self.link.is_open and self._writing_since is None:
                self.link.queue_close()
                await self._send_last_words()
            await self.close()

    def wake(self) -> None:
        """Send what was queued, together with all else that is queued until the writer gets its turn."""
        if not self._is_awake:
            self._is_awake = True
            self._wakeup.set()

    def note_use(self) -> None:
        self._used_at = trio.current_time()

    async def ping(self) -> float:
        """Seconds to the peer and back. Raises PeerUnavailable when the link ends first. The caller bounds the time."""
        if not self.is_running:
            raise PeerUnavailable(f"the link to node {self.peer_node_id} has ended")
        self.note_use()
        started_at = trio.current_time()
        ping_id = self.link.queue_ping()
        answered = self._pings[ping_id] = trio.Event()
        self.wake()
        try:
            await answered.wait()
        finally:
            del self._pings[ping_id]
        if not self.is_running:
            raise PeerUnavailable(f"the link to node {self.peer_node_id} ended before it answered a ping")
        return trio.current_time() - started_at

    def rekey(self) -> None:
        """Seal under the keyring's primary key from now on."""
        self.link.queue_rekey()
        if self.link.has_data_to_send:
            self.wake()

    def break_off(self, fault: str) -> None:
        """End run(), as if the link had broken by itself."""
        self._end(fault)

    async def part(self) -> None:
        """Say goodbye and close, instead of run()."""
        self.link.queue_close()
        await self._send_last_words()
        await self.close()

    async def close(self) -> None:
        """Close the stream at once, whatever it is doing."""
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(self._stream)

    def _end(self, fault: str | None) -> None:
        if self.is_running:
            self.is_running = False
            self.fault = fault
            self.nursery.cancel_scope.cancel()

    async def _read(self, handle: Callable[[LinkEvent], None]) -> None:
        self._dispatch(self._early_events, handle)
        self._early_events = []
        while True:
            try:
                data = await self._stream.receive_some(READ_BYTES)
            except trio.BrokenResourceError:
                return self._end("the connection was reset")
            if not data:
                return self._end("the connection ended without a goodbye")
            self._unanswered_pings = 0
            self.note_use()
            try:
                events = self.link.receive(data)
            except MalformedFrame as exc:
                self.rejection = "malformed"
                return self._end(f"the peer sent {exc}")
            except SealRejected as exc:
                self.rejection = exc.reason
                return self._end(f"the peer sent a frame that does not open: {exc.reason}")
            self._dispatch(events, handle)
            if self.link.pending_bytes > OUTGOING_BYTES_MAX + OUTGOING_SLACK_BYTES:
                return self._end(f"the peer left {self.link.pending_bytes} bytes unread")

    def _dispatch(self, events: list[LinkEvent], handle: Callable[[LinkEvent], None]) -> None:
        for event in events:
            if isinstance(event, LinkClosed):
                self._end(None)
            elif isinstance(event, PongReceived):
                self._report_load(event.load)
                for ping_id, answered in self._pings.items():
                    if ping_id <= event.ping_id:
                        answered.set()
            else:
                if isinstance(event, EventsReceived):
                    self._report_load(event.load)
                handle(event)
        if self.link.has_data_to_send:
            self.wake()

    def _report_load(self, load: bytes) -> None:
        if load and self._on_load is not None:
            self._on_load(self.peer_node_id, load)

    async def _write(self) -> None:
        while True:
            if not self.link.has_data_to_send:
                self._wakeup = trio.Event()
                self._is_awake = False
                await self._wakeup.wait()
            self.flush_count += 1
            data = memoryview(self.link.data_to_send(self._load_if_due()))
            for start in range(0, len(data), WRITE_BYTES):
                self._writing_since = trio.current_time()
                try:
                    await self._stream.send_all(data[start : start + WRITE_BYTES])
                except trio.BrokenResourceError:
                    return self._end("the connection was reset")
                if start + WRITE_BYTES < len(data):
                    self._unanswered_pings = 0  # pings wait behind this write; that it moves is sign enough
            self._writing_since = None

    def _load_if_due(self) -> bytes:
        now = trio.current_time()
        if self._load is None or now < self._load_due_at or not self.link.can_carry_load:
            return b""
        self._load_due_at = now + LOAD_PERIOD_S
        return self._load()

    async def _keep_alive(self) -> None:
        """Ping while streams are open; anything received counts as an answer. Without streams, close what is idle.

        Watches the writer too: a timeout around each write would cost as much as the write. A turn that comes over one
        interval late says that this process stood still, its peer's answers unread: the peer is not blamed for that."""
        config = self._config
        idle_timeout_s = config.idle_timeout_s * (1 if self.link.role is Role.INITIATOR else 2)
        now = trio.current_time()
        while True:
            due_at = now + config.ping_interval_s
            await trio.sleep_until(due_at)
            now = trio.current_time()
            if now - due_at > config.ping_interval_s:
                self._unanswered_pings = 0
                if self._writing_since is not None:
                    self._writing_since = now
            if self._writing_since is not None and now - self._writing_since > config.drain_timeout_s:
                return self._end(f"the peer read nothing for {config.drain_timeout_s:g} s")
            if self.link.stream_count == 0:
                self._unanswered_pings = 0
                if now - self._used_at >= idle_timeout_s:
                    return self._end(None)
            elif self._unanswered_pings >= config.pings_unanswered_max:
                return self._end(f"the peer left {self._unanswered_pings} pings unanswered")
            else:
                self.note_use()
                self._unanswered_pings += 1
                self.link.queue_ping()
                self.wake()

    async def _send_last_words(self) -> None:
        """Best effort, bounded, also while being cancelled; a peer that is gone does not need them."""
        with trio.move_on_after(GOODBYE_TIMEOUT_S, shield=True):
            try:
                await self._stream.send_all(self.link.data_to_send())
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                logger.debug("the peer was gone before the last frame", extra={"peer": self.peer_node_id})
