"""Takes a node out of service without losing a request: for a while (ai-cluster drain), or for good (SIGTERM, leave).

    at once           not ready in gossip and in /health/ready; every HTTP answer tells its client to open its next
                      connection elsewhere; requests that still come are answered, by other nodes where they can
    after notice_s    for good: new connections are refused, so that clients try their next address; a connection that
                      has been idle for notice_s is closed
    at 2/3 of drain_s answers generated here go on at other nodes; those that no node took are offered again each second
    at drain_s        for good: what still runs is cut

For good it ends as soon as nothing runs; where no client is connected and none came lately, without the notice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from nodes.dispatch import Dispatch
from nodes.http_server import HttpServer
from nodes.peer_operations import OperationFailed
from nodes.remote import PeerServer

logger = logging.getLogger(__name__)

DRAIN_POLL_S = 0.05
# Of the drain time: how long answers may finish here. The rest is for those that go on at another node.
DRAIN_FINISH_SHARE = 2 / 3
# Answers that could not be moved are offered again after so long: a node that was full or loading may take them now.
MOVE_INTERVAL_S = 1.0


class Drain:
    """active_requests: generations that this node's engines execute or queue. changed: called when the node's
    readiness has changed. step() has to be called every few hundred milliseconds."""

    def __init__(
        self,
        http: HttpServer,
        dispatch: Dispatch,
        peers: PeerServer,
        *,
        active_requests: Callable[[], int],
        changed: Callable[[], None],
        drain_s: float,
        notice_s: float,
    ) -> None:
        self._http = http
        self._dispatch = dispatch
        self._peers = peers
        self._active_requests = active_requests
        self._changed = changed
        self._drain_s = drain_s
        self._notice_s = notice_s
        self._began_at: float | None = None
        self._move_at = 0.0
        self._is_leaving = False

    @property
    def is_active(self) -> bool:
        """The node takes no new requests for its own engines."""
        return self._began_at is not None

    @property
    def running(self) -> int:
        """Requests that run here or through here."""
        return max(self._http.requests, self._dispatch.statistics().open_streams, self._active_requests())

    def begin(self) -> None:
        """Until undo(). May be repeated."""
        if self._began_at is None:
            self._start()

    def undo(self) -> None:
        """Take requests again. May be repeated. Raises OperationFailed when the node is about to end."""
        if self._is_leaving:
            raise OperationFailed("is about to end; start it again instead")
        if self._began_at is None:
            return
        self._began_at = None
        self._http.end_drain()
        self._changed()
        logger.info("drain undone: this node takes requests again")

    def step(self) -> None:
        """Move the answers generated here when their time has come, and again those that are still here."""
        now = trio.current_time()
        if self._began_at is None or now < self._move_at:
            return
        self._move_at = now + MOVE_INTERVAL_S
        moved = {"for_peers": self._peers.move_all(), "for_clients": self._dispatch.move_local()}
        if any(moved.values()):
            logger.info("answers generated here go on at other nodes", extra=moved)

    async def leave(self, hurried: trio.Event) -> None:
        """Until nothing runs here or through here, at most drain_s, or until `hurried`. The node may end then."""
        self._is_leaving = True
        self._start()
        now = began = trio.current_time()
        notice_ends = began + self._notice_s if self._http.is_in_use else began
        while now < began + self._drain_s and not hurried.is_set():
            if now >= notice_ends:
                self._http.close_listener()
                self._http.close_idle(self._notice_s)
                if not self.running and not self._http.has_idle:
                    return
            self.step()
            await trio.sleep(DRAIN_POLL_S)
            now = trio.current_time()
        if self.running:
            logger.warning("the streams still running are cut: the drain time is over, or a second signal came")

    def _start(self) -> None:
        logger.info("draining", extra={"drain_s": self._drain_s})
        self._began_at = trio.current_time()
        self._move_at = self._began_at + self._drain_s * DRAIN_FINISH_SHARE
        self._http.announce_drain()
        self._changed()
