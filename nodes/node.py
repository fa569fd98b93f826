"""One node, put together: sockets, mesh, engines, API; and the order in which they start and end.

Nesting is lifecycle: the mesh runs around the engines, the engines around HTTP. Stopping unwinds it: not ready, running
streams finish until the drain time is over, HTTP closes, gossip says LEAVE, the engines stop.
"""

from __future__ import annotations

import json
import logging
import os
import random
import secrets
import signal
import socket
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import hypercorn
import trio
from hypercorn.trio import serve

from mesh.errors import HandshakeRefused, MeshError, ModelUnknown
from mesh.forwarder import Forwarder, ForwarderConfig, IncomingStream
from mesh.gossip import Gossip, GossipConfig
from mesh.router import Router
from mesh.seal import Keyring
from mesh.udp import GossipSocket
from mesh.view import Address, ClusterView, ModelInfo, ModelLoad, NodeLoad, NodeProfile, Readiness
from nodes.api.app import build_app
from nodes.api.auth import Access
from nodes.api.services import Services
from nodes.config import ConfigInvalid, NodeConfig, is_loopback
from nodes.data_directory import DataDirectory
from nodes.dispatch import Dispatch
from nodes.engine.engine import Engine
from nodes.engine.model_loader import ModelFolderInvalid
from nodes.local import LocalGenerator
from nodes.local_mesh import READY_MESSAGE
from nodes.remote import RemoteGenerator, serve_peer
from nodes.sockets import bind_http, bind_mesh, bound_address
from observability.logs import configure_logging
from observability.metrics import Metrics

logger = logging.getLogger(__name__)

# How often this node's load is taken for gossip, which decides what of it is urgent.
LOAD_INTERVAL_S = 0.1
# While no seed has answered a handshake, how often each is tried.
SEED_CHECK_INTERVAL_S = 2.0
# Between the end of the drain and the end of HTTP: the last chunks on their way to clients.
HTTP_CLOSE_S = 2.0
STDIN_POLL_BYTES = 4096


def run_node(config: NodeConfig) -> None:
    """Run one node until SIGTERM or SIGINT. Raises ConfigInvalid, before or after the start, when it cannot run."""
    keyring = Keyring([config.cluster_key()], config.cluster_name)
    models = config.models()
    with ExitStack() as stack:
        data = stack.enter_context(DataDirectory(config.data_dir))
        http_socket = stack.enter_context(bind_http(config.http))
        mesh_udp, mesh_tcp = bind_mesh(config.mesh)
        stack.enter_context(mesh_udp)
        stack.enter_context(mesh_tcp)
        sockets = NodeSockets(http_socket, mesh_udp, mesh_tcp)
        stack.enter_context(_logging(config))
        node = Node(config, keyring, models, sockets, data.next_generation())
        stack.enter_context(node.announced_in(config.data_dir))
        try:
            trio.run(node.run, strict_exception_groups=True)
        except BaseExceptionGroup as group:
            raise _first_fault(group) from group


@dataclass(frozen=True, slots=True)
class NodeSockets:
    """Bound by run_node, which also closes them."""

    http: socket.socket
    mesh_udp: socket.socket
    mesh_tcp: socket.socket


def _first_fault(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The ConfigInvalid in the group, whatever else was cancelled beside it; else the group."""
    match, _ = group.split(ConfigInvalid)
    while isinstance(match, BaseExceptionGroup):
        match = match.exceptions[0]
    return match or group


class Node:
    """The parts of one node, and their lives."""

    def __init__(
        self,
        config: NodeConfig,
        keyring: Keyring,
        models: list[tuple[str, Path]],
        sockets: NodeSockets,
        generation: int,
    ) -> None:
        self._config = config
        self._models = models
        self._sockets = sockets
        self._node_id = config.node_id()
        self._http_address = bound_address(config.http, sockets.http)
        self._mesh_address = bound_address(config.mesh, sockets.mesh_tcp)
        self._version = version("ai-cluster")
        self._readiness = Readiness.LOADING
        self._loop_lag_s = 0.0
        self._engines: dict[str, Engine] = {}
        self._metrics = Metrics(self._node_id, self._version)
        self._local = LocalGenerator(self._engines, observer=self._metrics)
        boot_id = secrets.token_bytes(BOOT_ID_BYTES)
        self._forwarder = Forwarder(
            node_id=self._node_id,
            boot_id=boot_id,
            keyring=keyring,
            serve=partial(serve_peer, local=self._local),
            on_peer_lost=self._peer_failed,
        )
        advertised = config.advertise or self._mesh_address
        self._seeds = tuple(seed for seed in config.join if seed not in (advertised, self._mesh_address))
        self._gossip = Gossip(
            GossipConfig(),
            self._node_id,
            generation,
            advertised,
            self._seeds,
            keyring,
            boot_id,
            random.Random(),
            trio.current_time() if False else 0.0,
        )
