"""Recent events and the mesh's status for those who watch: who listens, and when there is something new."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address, ip_network

import trio

from mesh.errors import NoCapacity
from mesh.view import ClusterView
from nodes.events import Event, EventLog, Happening, ViewWatch

# Browsers and terminals that watch through this node. Each holds a connection.
LISTENERS_MAX = 64
# Of one client, by its address, so that one cannot take all places. Loopback, where a proxy in front of many may be,
# has the total alone.
LISTENERS_OF_ADDRESS_MAX = 8
IPV6_PREFIX_BITS = 64  # of one client
RETRY_AFTER_S = 10.0  # of a client that finds no place
# How often what gossip does not tell by itself is looked for: a load that grows old, a loop that lags.
OBSERVE_INTERVAL_S = 1.0
# A listener is woken at most so often; what comes meanwhile comes together.
WAKE_SPACING_S = 0.1


class EventFeed:
    """boot: tells this process's events from those of its former life. wall_clock: seconds since 1970."""

    def __init__(self, view: Callable[[], ClusterView], *, wall_clock: Callable[[], float] = time.time) -> None:
        self.boot = secrets.token_hex(4)
        self.is_closed = False
        self._view = view
        self._wall_clock = wall_clock
        self._log = EventLog()
        self._watch = ViewWatch()
        self._changed = trio.Event()
        self._listeners: Counter[str] = Counter()  # by network
        self._is_stale = True
        self._observed_at = 0.0

    @property
    def listeners(self) -> int:
        return self._listeners.total()

    @property
    def revision(self) -> int:
        return self._log.revision

    def add(self, happening: Happening) -> None:
        self._log.add(happening, self._wall_clock())
        self._wake()

    def view_changed(self) -> None:
        """The next step() looks at the view, instead of when it is time."""
        self._is_stale = True

    def step(self) -> None:
        """To be called every few hundred milliseconds."""
        now = trio.current_time()
        if not self._is_stale and now - self._observed_at < OBSERVE_INTERVAL_S:
            return
        self._is_stale, self._observed_at = False, now
        for happening in self._watch.observe(self._view()):
            self.add(happening)

    def since(self, revision: int) -> list[Event]:
        return self._log.since(revision)

    def listen(self, address: str) -> Listener:
        """address: the client's IP, or "". Raises NoCapacity at LISTENERS_MAX, and at LISTENERS_OF_ADDRESS_MAX for an
        address off loopback. The listener has to be closed."""
        if self.is_closed or self.listeners >= LISTENERS_MAX:
            raise NoCapacity(f"{self.listeners} clients watch this node, the limit is {LISTENERS_MAX}", RETRY_AFTER_S)
        network = _network_of(address)
        count = self._listeners.get(network, 0)
        if network and count >= LISTENERS_OF_ADDRESS_MAX:
            limit = LISTENERS_OF_ADDRESS_MAX
            raise NoCapacity(f"{count} clients of this address watch this node, the limit is {limit}", RETRY_AFTER_S)
        self._listeners[network] += 1
        return Listener(self, network)

    def close(self) -> None:
        """End all listeners: the node is about to close HTTP."""
        self.is_closed = True
        self._wake()

    async def wait(self, revision: int) -> None:
        """Until something has changed after that revision, or the feed is closed."""
        await trio.sleep(WAKE_SPACING_S)
        while self._log.revision <= revision and not self.is_closed:
            await self._changed.wait()

    def left(self, network: str) -> None:
        self._listeners[network] -= 1
        if not self._listeners[network]:
            del self._listeners[network]

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


class Listener(trio.abc.AsyncResource):
    """One place among LISTENERS_MAX, until it is closed."""

    def __init__(self, feed: EventFeed, network: str) -> None:
        self._feed: EventFeed | None = feed
        self._network = network

    async def aclose(self) -> None:
        feed, self._feed = self._feed, None
        if feed is not None:
            feed.left(self._network)
        await trio.lowlevel.checkpoint()


def _network_of(address: str) -> str:
    """Whose places are counted together; empty for loopback, and where there is no address."""
    try:
        ip = ip_address(address)
    except ValueError:
        return ""
    if ip.is_loopback:
        return ""
    return str(ip_network((ip, IPV6_PREFIX_BITS), strict=False)) if isinstance(ip, IPv6Address) else address
