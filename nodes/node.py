"""One node, put together: sockets, mesh, engines, API; and the order in which they start and end.

Nesting is lifecycle: the mesh runs around the engines, the engines around HTTP. Stopping unwinds it: not ready, running
streams finish until the drain time is over, HTTP closes, gossip says LEAVE, the engines stop.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any, cast

import hypercorn
import trio
from hypercorn.trio import serve

from mesh.errors import HandshakeRefused, PeerUnavailable
from mesh.forwarder import Forwarder
from mesh.gossip import Gossip, GossipConfig
from mesh.router import Router
from mesh.seal import BOOT_ID_BYTES, Keyring
from mesh.udp import GossipSocket
from mesh.view import Address, ClusterView, ModelInfo, ModelLoad, NodeLoad, NodeProfile, Readiness
from nodes.api.app import build_app
from nodes.api.auth import Access
from nodes.api.services import Services
from nodes.config import ConfigInvalid, NodeConfig, is_loopback
from nodes.dispatch import Dispatch
from nodes.engine.engine import FAILED, Engine, load_engine
from nodes.engine.model_loader import ModelFolder, ModelFolderInvalid
from nodes.figures import mesh_figures
from nodes.local import LocalGenerator
from nodes.messages import NODE_READY
from nodes.remote import RemoteGenerator, serve_peer
from nodes.sockets import NodeSockets, advertised_address, bound_address
from observability.collectors import Snapshot
from observability.log_writer import WriterThread
from observability.metrics import ExecutorMetrics, Metrics

logger = logging.getLogger(__name__)

# How often this node's load is taken for gossip, which decides what of it is urgent.
LOAD_INTERVAL_S = 0.1
# While no seed has answered a handshake, how often each is tried.
SEED_CHECK_INTERVAL_S = 2.0
# What is left of a late wake-up of the loop in the reported lag, each LOAD_INTERVAL_S.
LAG_DECAY = 0.8
DRAIN_POLL_S = 0.05
# Longer than the 60 s for which balancers in front keep idle connections.
KEEP_ALIVE_TIMEOUT_S = 75.0
KEEP_ALIVE_REQUESTS_MAX = 100_000
# Between the end of the drain and the end of HTTP: the last chunks on their way to clients.
HTTP_CLOSE_S = 2.0


@dataclass(frozen=True, slots=True)
class StopRequest:
    """asked: stop when the running streams have finished. hurried: do not wait for them any longer."""

    asked: trio.Event = field(default_factory=trio.Event)
    hurried: trio.Event = field(default_factory=trio.Event)


class Node:
    """The parts of one node, and their lives. Made inside trio."""

    def __init__(
        self,
        config: NodeConfig,
        keyring: Keyring,
        folders: list[tuple[str, ModelFolder]],
        sockets: NodeSockets,
        generation: int,
        keep_generation: Callable[[int], None],
        log_writer: WriterThread[logging.LogRecord],
    ) -> None:
        self._config = config
        self._generation = generation
        self._keep_generation = keep_generation
        self._log_writer = log_writer
        self._folders = folders
        self._sockets = sockets
        self._node_id = config.node_id()
        self._version = version("ai-cluster")
        self._readiness = Readiness.LOADING
        self._loop_lag_s = 0.0
        self._engines: dict[str, Engine] = {}
        self._metrics = Metrics(self._node_id, self._version)
        self._local = LocalGenerator(self._engines, observer=ExecutorMetrics(self._metrics))
        boot_id = secrets.token_bytes(BOOT_ID_BYTES)
        self._forwarder = Forwarder(
            node_id=self._node_id,
            boot_id=boot_id,
            keyring=keyring,
            serve=partial(serve_peer, local=self._local),
            on_peer_lost=self._peer_failed,
        )
        bound = bound_address(config.mesh, sockets.mesh_tcp)
        advertised = advertised_address(config, bound)
        self._seeds = tuple(seed for seed in config.join if seed not in (advertised, bound))
        self._gossip = Gossip(
            GossipConfig(),
            self._node_id,
            generation,
            advertised,
            self._seeds,
            keyring,
            boot_id,
            random.Random(),
            trio.current_time(),
        )
        self._gossip_socket = GossipSocket(
            self._gossip,
            sockets.mesh_udp,
            ping_link=self._forwarder.ping,
            # A peer's models count under their names from its arrival on.
            on_change=lambda change: self._metrics.know_view(self._view()),
        )
        self._dispatch = Dispatch(
            view=self._view,
            router=Router(random.Random()),
            local=self._local,
            remote=partial(RemoteGenerator, self._forwarder),
            peer_failed=self._peer_failed,
        )

    async def run(self, stop: StopRequest) -> None:
        """Until a stop is asked for, then drain.

        Raises ConfigInvalid for a model that cannot be loaded, or a key that every seed refuses.
        """
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._sockets.mesh_tcp.dup()))
        async with trio.open_nursery() as mesh:
            await mesh.start(self._forwarder.run, [listener])
            await mesh.start(self._gossip_socket.run)
            async with trio.open_nursery() as engines:
                async with trio.open_nursery() as nursery:
                    http_stop = trio.Event()
                    http_stopped = await nursery.start(self._serve_http, http_stop)
                    nursery.start_soon(self._publish_load)
                    nursery.start_soon(self._check_seeds)
                    nursery.start_soon(self._load_models, engines)
                    await stop.asked.wait()
                    await self._drain(stop)
                    http_stop.set()
                    with trio.move_on_after(HTTP_CLOSE_S + 1):
                        await http_stopped.wait()
                    nursery.cancel_scope.cancel()
                self._gossip_socket.leave()
                engines.cancel_scope.cancel()
            mesh.cancel_scope.cancel()
        logger.info("node stopped")

    # What lives while the node does.

    async def _serve_http(
        self, stop: trio.Event, *, task_status: trio.TaskStatus[trio.Event] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """hypercorn around the application. Starts with an event that is set when the last connection is closed."""
        config = hypercorn.Config()
        config.bind = [f"fd://{os.dup(self._sockets.http.fileno())}"]  # hypercorn closes what it is given
        config.errorlog = logging.getLogger("hypercorn.error")
        config.errorlog.setLevel(logging.WARNING)  # below that it only tells the address, as the line further down
        config.graceful_timeout = HTTP_CLOSE_S
        config.keep_alive_timeout = KEEP_ALIVE_TIMEOUT_S
        config.keep_alive_max_requests = KEEP_ALIVE_REQUESTS_MAX
        config.include_server_header = False
        stopped = trio.Event()
        app = build_app(self._services())
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(serve, cast(Any, app), config, shutdown_trigger=stop.wait, mode="asgi"))
            address = bound_address(self._config.http, self._sockets.http)
            logger.info("serving HTTP", extra={"address": str(address)})
            self._publish_profile()
            task_status.started(stopped)
        stopped.set()

    def _services(self) -> Services:
        config = self._config
        return Services(
            node_id=self._node_id,
            version=self._version,
            cluster_name=config.cluster_name,
            access=Access(is_open=config.open or is_loopback(config.http.host)),
            dispatch=self._dispatch,
            view=self._view,
            metrics=self._metrics,
            render_metrics=self._render_metrics,
            deadline_s=config.deadline_s,
            body_bytes_max=config.body_bytes_max,
            nodes_expected=config.nodes_expected,
        )

    async def _load_models(self, engines: trio.Nursery) -> None:
        """Load one model after the other in a worker thread, then report ready."""
        for name, folder in self._folders:
            logger.info("loading a model", extra={"model": name})
            try:
                engine = await trio.to_thread.run_sync(partial(load_engine, folder, **self._engine_options()))
            except ModelFolderInvalid as exc:
                raise ConfigInvalid(str(exc)) from exc
            await engines.start(engine.run)
            self._engines[name] = engine
            statistics = engine.statistics()
            self._metrics.model_loaded(name, statistics.load_time_s, statistics.model_memory_bytes)
            self._publish_profile()
        self._readiness = Readiness.READY
        self._gossip_socket.set_load(self._load())
        logger.info(NODE_READY, extra={"models": [name for name, _ in self._folders]})

    def _engine_options(self) -> dict[str, Any]:
        config = self._config
        return {
            "slots": config.slots,
            "queue_limit": config.queue,
            "capacity": config.capacity,
            "threads": config.threads,
            "spinning": config.spinning,
            "provider": config.provider,
        }

    async def _publish_load(self) -> None:
        """Hand this node's load to gossip, and measure how late the loop runs."""
        due = trio.current_time()
        while True:
            due += LOAD_INTERVAL_S
            await trio.sleep_until(due)
            late_s = trio.current_time() - due
            # A single late wake-up shows for about a second, so that a publication carries it.
            self._loop_lag_s = max(late_s, self._loop_lag_s * LAG_DECAY)
            due += late_s
            if self._readiness is Readiness.READY and any(
                e.statistics().state == FAILED for e in self._engines.values()
            ):
                self._readiness = Readiness.FAILED
                logger.error("an engine has failed; this node takes no more requests until it is restarted")
            self._gossip_socket.set_load(self._load())
            generation = self._view().me.generation
            if generation > self._generation:
                # Peers remembered a later life of this node than its data directory does.
                await trio.to_thread.run_sync(self._keep_generation, generation)
                self._generation = generation

    async def _check_seeds(self) -> None:
        """Shake hands with the seeds until one accepts. Raises ConfigInvalid when all that answer refuse this node."""
        while self._seeds:
            refusals = {}
            for seed in self._seeds:
                try:
                    await self._forwarder.check_seed(seed)
                except HandshakeRefused as exc:
                    refusals[seed] = exc.reason
                except PeerUnavailable:
                    continue  # gossip retries it, and its log line says so
                else:
                    return
            if refusals:
                raise ConfigInvalid(_refused(refusals, self._config.cluster_name))
            await trio.sleep(SEED_CHECK_INTERVAL_S)

    async def _drain(self, stop: StopRequest) -> None:
        """Take no new requests, and let what runs here or through here finish until the drain time is over."""
        logger.info("draining", extra={"drain_s": self._config.drain_s})
        self._readiness = Readiness.DRAINING
        self._gossip_socket.set_load(self._load())
        with trio.move_on_after(self._config.drain_s):
            while not stop.hurried.is_set():
                if not (self._dispatch.statistics().open_streams or self._load().active_requests):
                    return
                await trio.sleep(DRAIN_POLL_S)
        logger.warning("the streams still running are cut: the drain time is over, or a second signal came")

    # What other parts ask.

    def _view(self) -> ClusterView:
        return self._gossip.view(trio.current_time())

    def _peer_failed(self, node_id: str) -> None:
        self._gossip_socket.link_failed(node_id)

    def _load(self) -> NodeLoad:
        engines = {name: engine.statistics() for name, engine in self._engines.items()}
        return NodeLoad(
            readiness=self._readiness,
            active_requests=sum(engine.active + engine.queued for engine in engines.values()),
            tokens_per_s=sum(engine.tokens_per_s for engine in engines.values()),
            loop_lag_s=self._loop_lag_s,
            models={
                name: ModelLoad(
                    active=engine.active,
                    queued=engine.queued,
                    free_slots=engine.free_slots,
                    prefill_rate=engine.prefill_rate,
                    decode_rate=engine.decode_rate,
                    step_count=engine.step_count,
                    queued_tokens=engine.queued_tokens,
                )
                for name, engine in engines.items()
            },
        )

    def _publish_profile(self) -> None:
        """Tell what this node serves. What still loads is told of too: it is refused for now, not unknown."""
        models = []
        for name, folder in self._folders:
            engine = self._engines.get(name)
            models.append(
                ModelInfo(
                    name=name,
                    fingerprint=engine.fingerprint if engine else "",
                    context_length=engine.context_length if engine else folder.context_length,
                    slots=self._config.slots,
                    queue_limit=self._config.queue,
                )
            )
        http = str(bound_address(self._config.http, self._sockets.http))
        self._gossip_socket.set_profile(NodeProfile(http, self._version, tuple(models)))

    async def _render_metrics(self, accept: str) -> tuple[str, bytes]:
        load = self._load()
        snapshot = Snapshot(
            view=self._view(),
            active_requests=load.active_requests,
            engines={name: engine.statistics() for name, engine in self._engines.items()},
            mesh=mesh_figures(
                self._gossip.statistics(),
                self._gossip_socket.statistics(),
                self._forwarder.statistics(),
                self._dispatch.statistics(),
            ),
            nodes_expected=self._config.nodes_expected,
            log_lines_dropped=self._log_writer.lines_dropped,
        )
        return await self._metrics.render(snapshot, accept)


def _refused(refusals: Mapping[Address, str], cluster_name: str) -> str:
    """One line for all seeds that answered and declined."""
    seeds = ", ".join(f"{address} ({reason})" for address, reason in refusals.items())
    fix = "give this node the mesh's own cluster key with --cluster-key-file"
    if set(refusals.values()) == {"other cluster"}:
        fix = f"this node's --cluster-name is {cluster_name!r}; give it the mesh's"
    elif set(refusals.values()) == {"protocol version"}:
        fix = "run versions of AI Cluster that share a protocol version"
    return f"every seed that answers refuses this node's cluster key handshake: {seeds}; {fix}"
