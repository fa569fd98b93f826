"""One node as a process: what it takes hold of before it starts, and how it ends. Every fault becomes one line."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import trio

from nodes import garbage
from nodes.certificate import configured_certificate
from nodes.config import ConfigInvalid, NodeConfig, is_loopback
from nodes.data_directory import DataDirectory, folder_fix
from nodes.engine.model_folder import ModelFolderInvalid
from nodes.engine.model_kinds import AnyFolder, read_folder
from nodes.keyring_file import load_keyring
from nodes.node import Node, StopRequest
from nodes.sockets import NodeSockets, bind_http, bind_mesh, bound_address, check_distinct
from nodes.store import open_store
from nodes.tracing_setup import enter_tracing
from observability.log_writer import WriterThread
from observability.logs import configure_logging

logger = logging.getLogger(__name__)

# Read from a standard input that is only watched for its end.
STDIN_BYTES = 4096
ADDRESS_FILE = "node.json"


def run_node(config: NodeConfig) -> None:
    """Run one node until SIGTERM or SIGINT. Raises ConfigInvalid, before or after the start, when it cannot run."""
    folders = [(name, _read_folder(config, path)) for name, path in config.models()]
    with ExitStack() as stack:
        data = stack.enter_context(DataDirectory(config.data_dir))
        check_distinct(config)
        sockets = NodeSockets(stack.enter_context(bind_http(config.http)), *bind_mesh(config.mesh))
        stack.enter_context(sockets.mesh_udp)
        stack.enter_context(sockets.mesh_tcp)
        log_writer = _enter_logging(stack, config)
        stack.enter_context(_address_file(data, config, sockets))
        keyring = load_keyring(config.data_dir, config)
        admin_token = config.admin_token or data.admin_token()
        generation = data.next_generation()
        certificate = configured_certificate(config)
        tracer = enter_tracing(stack, config)
        _warn_of_exposure(config)

        async def main() -> None:
            stop = StopRequest()
            async with open_store(config.data_dir) as store, trio.open_nursery() as nursery:
                records = await store.records()
                node = Node(
                    config,
                    keyring,
                    folders,
                    sockets,
                    generation,
                    data.keep_generation,
                    log_writer,
                    admin_token,
                    store,
                    records,
                    certificate,
                    tracer,
                )
                await nursery.start(_watch_signals, stop)
                if config.stop_with_stdin:
                    nursery.start_soon(_watch_stdin, stop)
                garbage.settle()
                await node.run(stop)
                nursery.cancel_scope.cancel()

        try:
            trio.run(main, strict_exception_groups=True)
        except BaseExceptionGroup as group:
            raise _first_fault(group) from group


def _warn_of_exposure(config: NodeConfig) -> None:
    """What an operator may have opened without knowing."""
    key_file = config.cluster_key_file
    if key_file is not None and os.name == "posix" and key_file.stat().st_mode & 0o077:
        logger.warning("other users may read the cluster key; chmod 600 it", extra={"file": str(key_file)})
    tls_key_file = config.tls_key_file
    if tls_key_file is not None and os.name == "posix" and tls_key_file.stat().st_mode & 0o007:
        logger.warning("all users may read the TLS key; chmod 640 it", extra={"file": str(tls_key_file)})
    if not is_loopback(config.http.host):
        v1 = "open to everyone, while no API key was ever created" if config.open else "refused without an API key"
        reason = f"/v1 is {v1}; health, metrics and status are open"
        logger.warning("the HTTP address is off loopback", extra={"address": str(config.http), "reason": reason})
        if config.tls_cert_file is None:
            logger.warning(
                "API keys and the admin token travel in clear over plain HTTP; give --tls-cert-file and "
                "--tls-key-file, or put a proxy with TLS before it",
                extra={"address": str(config.http)},
            )


def _enter_logging(stack: ExitStack, config: NodeConfig) -> WriterThread[logging.LogRecord]:
    logs = configure_logging(config.log_dir, config.node_id(), config.log_level, config.log_console)
    try:
        return stack.enter_context(logs)
    except OSError as exc:
        raise ConfigInvalid(f"log_dir {config.log_dir}: {exc.strerror}; {folder_fix(exc, '--log-dir')}") from exc


def _read_folder(config: NodeConfig, path: Path) -> AnyFolder:
    try:
        return read_folder(path, config.variant, config.provider)
    except ModelFolderInvalid as exc:
        raise ConfigInvalid(str(exc)) from exc


@contextmanager
def _address_file(data: DataDirectory, config: NodeConfig, sockets: NodeSockets) -> Iterator[None]:
    """`<data_dir>/node.json` while the node runs: where it is and which process it is, for scripts.

    Raises ConfigInvalid where it cannot be written."""
    content = {
        "name": config.node_id(),
        "pid": os.getpid(),
        "http": str(bound_address(config.http, sockets.http)),
        "mesh": str(bound_address(config.mesh, sockets.mesh_tcp)),
    }
    data.write_start_file(ADDRESS_FILE, json.dumps(content) + "\n")
    try:
        yield
    finally:
        (data.path / ADDRESS_FILE).unlink(missing_ok=True)


def _first_fault(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The ConfigInvalid in the group, whatever else ended beside it; else the group."""
    fault: BaseException | None = group.subgroup(ConfigInvalid)
    while isinstance(fault, BaseExceptionGroup):
        fault = fault.exceptions[0]
    return fault or group


async def _watch_signals(stop: StopRequest, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """SIGTERM or SIGINT asks for a stop; another one hurries it."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for _ in signals:
            if stop.asked.is_set():
                stop.hurried.set()
            stop.asked.set()


async def _watch_stdin(stop: StopRequest) -> None:
    # os.read and not sys.stdin: a thread left behind in it holds no lock that the interpreter's exit needs.
    while await trio.to_thread.run_sync(os.read, sys.stdin.fileno(), STDIN_BYTES, abandon_on_cancel=True):
        pass
    stop.asked.set()
