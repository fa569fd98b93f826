"""One node, put together: sockets, mesh, engines, API; and the order in which they start and end.

Nesting is lifecycle: the mesh runs around the engines, the engines around HTTP. Stopping unwinds it: not ready, running
streams finish until the drain time is over (nodes.drain), HTTP closes, gossip says LEAVE, the engines stop
(nodes.engine.step_watch.STOP_TIMEOUT_S at most), the mesh ends.
"""

from __future__ import annotations

import logging
import random
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version

import trio

from mesh import state_exchange
from mesh.errors import MalformedDatagram
from mesh.forwarder import Forwarder, IncomingStream
from mesh.gossip import Gossip
from mesh.gossip_types import MemberChanged
from mesh.own_counters import OwnCounters
from mesh.prefix_digests import DIGEST_INTERVAL_S, encode_digest
from mesh.replica import Record
from mesh.router import Router
from mesh.seal import BOOT_ID_BYTES
from mesh.state import decode_load, encode_load
from mesh.udp import GossipSocket
from mesh.view import (
    Address,
    ClusterView,
    NodeLoad,
    NodeProfile,
    Readiness,
)
from nodes import embedding_codec, peer_questions
from nodes.api.admin_access import AdminAccess
from nodes.api.app import build_app
from nodes.api.services import Services
from nodes.certificate import Certificate
from nodes.cluster_metrics import QUESTION_METRICS, ClusterMetrics
from nodes.config import ConfigInvalid, NodeConfig, is_loopback
from nodes.dispatch import Dispatch
from nodes.drain import Drain
from nodes.embedding_dispatch import EmbeddingDispatch
from nodes.engine.engine_statistics import EngineStatistics
from nodes.engine.model_kinds import AnyFolder
from nodes.event_feed import EventFeed
from nodes.events import Happening
from nodes.figures import mesh_figures
from nodes.http_server import HttpServer, connections_max
from nodes.keyring_file import KeyringFile
from nodes.local import LocalGenerator
from nodes.local_embedder import LocalEmbedder
from nodes.member_views import QUESTION_VIEW, MemberViews
from nodes.mesh_operations import MeshOperations
from nodes.messages import NODE_READY
from nodes.node_access import NodeAccess
from nodes.node_models import NodeModels, model_load
from nodes.node_operations import NodeOperations
from nodes.peer_operations import ask_peer
from nodes.remote import PeerServer, RemoteGenerator
from nodes.remote_embedder import EmbeddingServer, RemoteEmbedder
from nodes.seed_check import SeedCheck
from nodes.sockets import NodeSockets, advertised_address, bound_address
from nodes.store import Store
from observability.collectors import KeyLimit, Snapshot
from observability.families import LABEL_VALUES_MAX
from observability.log_writer import WriterThread
from observability.metrics import ExecutorMetrics, Exposition, Metrics
from observability.tracing import NO_TRACING, Tracer

logger = logging.getLogger(__name__)

# How often this node's load is taken for gossip, which decides what of it is urgent.
LOAD_INTERVAL_S = 0.1
# Counted from 0 on, so that rate() sees the first answer, error and refusal of each.
GENERATING_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
GENERATING_STATUSES = (200, 429, 500, 503)
# What is left of a late wake-up of the loop in the reported lag, each LOAD_INTERVAL_S.
LAG_DECAY = 0.8
# The lag is told in steps, so that an idle node's load stays the same and costs the mesh a sign of life, not a record.
LAG_STEP_S = 0.01
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
        keyring: KeyringFile,
        folders: list[tuple[str, AnyFolder]],
        sockets: NodeSockets,
        generation: int,
        keep_generation: Callable[[int], None],
        log_writer: WriterThread[logging.LogRecord],
        admin_token: str,
        store: Store,
        records: list[Record],
        certificate: Certificate | None = None,
        tracer: Tracer = NO_TRACING,
    ) -> None:
        """records: those of the store. certificate: None serves plain HTTP."""
        self._config = config
        self._tracer = tracer
        self._generation = generation
        self._keep_generation = keep_generation
        self._log_writer = log_writer
        self._sockets = sockets
        self._node_id = config.node_id()
        self._version = version("ai-cluster")
        self._models = NodeModels(config, folders)
        self._loop_lag_s = 0.0
        self._view_hash = 0  # as told in this node's load
        self._records_digest = ""
        self._fenced = trio.Event()
        self._fenced_by: Address | None = None
        self._metrics = Metrics(self._node_id, self._version)
        for path in GENERATING_PATHS:
            self._metrics.know_route("POST", path, GENERATING_STATUSES)
        observer = ExecutorMetrics(self._metrics)
        self._local = LocalGenerator(self._models.generation, observer=observer, tracer=tracer)
        self._local_embedder = LocalEmbedder(self._models.embedding, observer=observer, tracer=tracer)
        self._admin_access = AdminAccess(admin_token)
        self._leave_asked = trio.Event()
        boot_id = secrets.token_bytes(BOOT_ID_BYTES)
        self._forwarder = Forwarder(
            node_id=self._node_id,
            boot_id=boot_id,
            keyring=keyring.ring,
            serve=self._serve_peer,
            load=self._encode_link_load,
            on_load=self._observe_load,
            on_peer_lost=self._peer_failed,
        )
        bound = bound_address(config.mesh, sockets.mesh_tcp)
        advertised = advertised_address(config, bound)
        seeds = tuple(seed for seed in config.join if seed not in (advertised, bound))
        self._seed_check = SeedCheck(seeds, self._forwarder.check_seed, self._node_id, config.cluster_name)
        own_counters = OwnCounters(generation)
        self._gossip = Gossip(
            config.gossip.config(),
            self._node_id,
            generation,
            advertised,
            seeds,
            keyring.ring,
            boot_id,
            random.Random(),
            trio.current_time(),
            usage=own_counters.section,
        )
        self._gossip_socket = GossipSocket(
            self._gossip,
            sockets.mesh_udp,
            ping_link=self._forwarder.ping,
            ask_link=partial(state_exchange.ask, self._forwarder),
            on_fenced=self._give_way,
            on_seed_unanswered=lambda seed: self._seed_check.note_silence(),
            on_change=self._member_changed,
            on_usage=lambda node_id, section: self._access.hear_usage(node_id, section),
        )
        self._events = EventFeed(self._view)
        self._member_views = MemberViews(self._view, partial(peer_questions.ask, self._forwarder, QUESTION_VIEW))
        self._access = NodeAccess(
            node_id=self._node_id,
            generation=generation,
            store=store,
            records=records,
            own_counters=own_counters,
            forwarder=self._forwarder,
            view=self._view,
            publish=self._publish_records,
            usage_changed=self._gossip_socket.usage_changed,
            is_open=config.open or is_loopback(config.http.host),
            has_seeds=bool(seeds),
            hold_s=config.limits_partition_hold_s,
        )
        self._cluster_metrics = ClusterMetrics(
            view=self._view,
            ask=partial(peer_questions.ask, self._forwarder, QUESTION_METRICS),
            render=self._render_metrics,
        )
        self._answerers = {
            **self._access.answerers,
            QUESTION_VIEW: self._member_views.answer,
            QUESTION_METRICS: self._cluster_metrics.answer,
        }
        self._own_operations = NodeOperations(
            keyring=keyring,
            view=self._view,
            keyring_changed=self._forwarder.keyring_changed,
            forget=self._gossip_socket.forget,
            stop=self._leave_asked.set,
            begin_drain=lambda: self._drain.begin(),
            undo_drain=lambda: self._drain.undo(),
            running=lambda: self._drain.running,
        )
        self._peer_server = PeerServer(self._local, self._own_operations.handlers, tracer)
        self._embedding_server = EmbeddingServer(self._local_embedder, tracer)
        self._mesh_operations = MeshOperations(
            view=self._view,
            local=self._own_operations.handlers,
            ask=partial(ask_peer, self._forwarder),
            check_seed=self._forwarder.check_seed,
            add_seed=self._gossip_socket.add_seed,
        )
        self._dispatch = Dispatch(
            view=self._view_with_own_load,
            router=Router(random.Random()),
            local=self._local,
            remote=partial(RemoteGenerator, self._forwarder),
            peer_failed=self._peer_failed,
            rng=random.Random(),
            hedges=config.hedge,
            on_move=lambda move: self._events.add(Happening(move.kind, move.target, move.reason, move.origin)),
            tracer=tracer,
        )
        self._embeddings = EmbeddingDispatch(
            view=self._view_with_own_load,
            router=Router(random.Random()),
            local=self._local_embedder,
            remote=partial(RemoteEmbedder, self._forwarder),
            peer_failed=self._peer_failed,
            counts=self._dispatch.counts,
            tracer=tracer,
        )
        self._http_address = bound_address(config.http, sockets.http)
        self._certificate = certificate
        self._http = HttpServer(
            build_app(self._services()), sockets.http, connections_max(config.http_connections_max), certificate
        )
        self._drain = Drain(
            self._http,
            self._dispatch,
            self._peer_server,
            active_requests=self._models.active_requests,
            changed=lambda: self._gossip_socket.set_load(self._load()),
            drain_s=config.drain_s,
            notice_s=config.drain_notice_s,
        )

    async def run(self, stop: StopRequest) -> None:
        """Until a stop is asked for, then drain.

        Raises ConfigInvalid for a model that cannot be loaded, or a key that every seed refuses.
        """
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._sockets.mesh_tcp.dup()))
        async with trio.open_nursery() as mesh:
            await mesh.start(self._forwarder.run, [listener])
            await mesh.start(self._gossip_socket.run)
            await mesh.start(self._mesh_operations.run)
            await mesh.start(self._dispatch.run)
            await mesh.start(self._access.run)
            mesh.start_soon(self._stop_when_asked_to_leave, stop)
            try:
                async with trio.open_nursery() as engines:
                    await self._serve(stop, engines)
                    self._gossip_socket.leave()  # now: the engines' stop may wait for a step in progress
                    engines.cancel_scope.cancel()
            finally:
                self._gossip_socket.leave()  # after a fault: peers need not wait for a death to be found
                mesh.cancel_scope.cancel()
        logger.info("node stopped")

    async def _stop_when_asked_to_leave(self, stop: StopRequest) -> None:
        await self._leave_asked.wait()
        stop.asked.set()

    async def _serve(self, stop: StopRequest, engines: trio.Nursery) -> None:
        """Answer HTTP and load models, until the stop and the drain after it."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._http.run)
            logger.info("serving HTTP", extra={"address": str(self._http_address)})
            self._publish_profile()
            nursery.start_soon(self._publish_load)
            nursery.start_soon(self._publish_digest)
            nursery.start_soon(self._seed_check.run)
            nursery.start_soon(self._watch_fence)
            nursery.start_soon(self._load_models, engines)
            await stop.asked.wait()
            await self._drain.leave(stop.hurried)
            self._events.close()
            await self._http.close(HTTP_CLOSE_S)
            nursery.cancel_scope.cancel()

    def _services(self) -> Services:
        config = self._config
        return Services(
            node_id=self._node_id,
            version=self._version,
            cluster_name=config.cluster_name,
            gate=self._access.gate,
            dispatch=self._dispatch,
            embeddings=self._embeddings,
            view=self._view,
            metrics=self._metrics,
            render_metrics=self._render_metrics,
            render_cluster_metrics=self._cluster_metrics.render,
            deadline_s=config.deadline_s,
            body_bytes_max=config.body_bytes_max,
            nodes_expected=config.nodes_expected,
            admin_access=self._admin_access,
            operations=self._mesh_operations,
            key_admin=self._access.key_admin,
            events=self._events,
            member_views=self._member_views,
            cors_origins=config.cors_origins,
            tracer=self._tracer,
        )

    # What lives while the node does.

    async def _load_models(self, engines: trio.Nursery) -> None:
        """Load the models, then report ready."""

        def loaded(name: str, statistics: EngineStatistics) -> None:
            self._metrics.model_loaded(name, statistics.load_time_s, statistics.model_memory_bytes)
            self._publish_profile()

        await self._models.load(engines, loaded)
        await self._access.wait_known()
        self._models.ready()
        self._gossip_socket.set_load(self._load())
        logger.info(NODE_READY, extra={"models": self._models.names})

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
            self._models.check()
            self._drain.step()
            self._view_hash = self._view().hash()
            self._gossip_socket.set_load(self._load())
            self._events.step()
            generation = self._view().me.generation
            if generation > self._generation:
                # Peers remembered a later life of this node than its data directory does.
                self._generation = generation
                self._access.renew(generation)
                try:
                    await trio.to_thread.run_sync(self._keep_generation, generation)
                except OSError as exc:  # the next start learns it from peers again
                    logger.error("cannot keep the generation", extra={"reason": str(exc)})

    async def _publish_digest(self) -> None:
        """Tell the mesh which conversations this node's engines have cached, as often as a digest may change."""
        told: dict[str, list[tuple[int, ...]]] = {}
        while True:
            await trio.sleep(DIGEST_INTERVAL_S)
            cached = self._models.cached_conversations()
            if cached != told:
                told = cached
                self._gossip_socket.set_bulk(encode_digest(cached))

    async def _watch_fence(self) -> None:
        """Raises ConfigInvalid when another process has this node's name: two would take each other's requests."""
        await self._fenced.wait()
        raise ConfigInvalid(
            f"another process at {self._fenced_by} runs under the name {self._node_id!r} and answers: "
            "give each node a --name and a --data-dir of its own, or stop the other"
        )

    # What other parts ask.

    async def _serve_peer(self, stream: IncomingStream) -> None:
        if state_exchange.is_question(stream.request):
            await state_exchange.answer(stream, self._gossip)
        elif embedding_codec.is_embedding(stream.request):
            await self._embedding_server.serve(stream)
        elif peer_questions.is_question(stream.request):
            await peer_questions.answer(stream, self._answerers)
        else:
            await self._peer_server.serve(stream)

    def _publish_records(self, digest: str) -> None:
        self._records_digest = digest
        self._publish_profile()

    def _encode_link_load(self) -> bytes:
        return encode_load(replace(self._load(), after_version=self._gossip.own_version))

    def _observe_load(self, node_id: str, report: bytes) -> None:
        with suppress(MalformedDatagram):  # of a later version: gossip carries what this one can read
            self._gossip.observe_load(node_id, decode_load(report), trio.current_time())

    def _give_way(self, address: Address) -> None:
        self._fenced_by = address
        self._fenced.set()

    def _member_changed(self, change: MemberChanged) -> None:
        self._access.member_changed(change.after)
        self._metrics.know_view(self._view())  # a peer's models count under their names from its arrival on
        self._events.view_changed()

    def _view(self) -> ClusterView:
        """With what this node has witnessed itself."""
        view = self._gossip.view(trio.current_time())
        return replace(view, witnessed=self._dispatch.witnessed) if self._dispatch.witnessed else view

    def _view_with_own_load(self) -> ClusterView:
        """For routing: this node's own row as of now, not as of its last publication."""
        self._gossip_socket.set_load(self._load())
        return self._view()

    def _peer_failed(self, node_id: str) -> None:
        self._gossip_socket.link_failed(node_id)

    def _load(self) -> NodeLoad:
        engines = self._models.statistics()
        return NodeLoad(
            readiness=Readiness.DRAINING if self._drain.is_active else self._models.readiness,
            active_requests=sum(engine.active + engine.queued for engine in engines.values()),
            tokens_per_s=sum(engine.tokens_per_s for engine in engines.values()),
            loop_lag_s=round(self._loop_lag_s / LAG_STEP_S) * LAG_STEP_S,
            view_hash=self._view_hash,
            models={name: model_load(engine) for name, engine in engines.items()},
        )

    def _publish_profile(self) -> None:
        models = self._models.infos()
        self._gossip_socket.set_profile(
            NodeProfile(str(self._http_address), self._version, models, self._records_digest)
        )

    async def _render_metrics(self, accept: str, accept_encoding: str) -> Exposition:
        uses = await self._access.gate.limit_uses(LABEL_VALUES_MAX)
        snapshot = Snapshot(
            view=self._view(),
            active_requests=self._models.active_requests(),
            loop_lag_s=self._loop_lag_s,
            engines=self._models.statistics(),
            kv={name: engine.kv_rows() for name, engine in self._models.generation.items()},
            key_ids=self._access.gate.key_labels(),
            limits=[
                KeyLimit(key_id, kind, limit, used)
                for key_id, kinds in uses.items()
                for kind, (limit, used) in kinds.items()
            ],
            mesh=mesh_figures(
                self._gossip.statistics(),
                self._gossip_socket.statistics(),
                self._forwarder.statistics(),
                self._dispatch.statistics(),
                self._http.statistics(),
                self._access.figures(),
                self._tracer.statistics(),
                None if self._certificate is None else self._certificate.expires_at,
            ),
            nodes_expected=self._config.nodes_expected,
            log_lines_dropped=self._log_writer.lines_dropped,
        )
        return await self._metrics.render(snapshot, accept, accept_encoding)
