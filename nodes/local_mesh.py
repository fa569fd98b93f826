"""`ai-cluster up`: several nodes as child processes on loopback, their output merged, and nothing left when it ends."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import trio
from rich.console import Console
from rich.text import Text

from mesh.view import Address
from nodes.access.api_key import RECORD_PREFIX
from nodes.config import ConfigInvalid, load_config
from nodes.messages import NODE_READY
from nodes.sockets import bind_http, bind_mesh
from nodes.store import holds_records
from observability.logs import LogMerger

# Longest line taken from a child; a longer one is cut into pieces of this size.
LINE_BYTES_MAX = 64 * 1024
# What a child gets beyond its own drain time before it is killed.
STOP_GRACE_S = 5.0
_COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")
_LEVEL_STYLES = {"warning": "yellow", "error": "bold red", "critical": "bold red"}
# Shown on the terminal behind a message; the rest is in the log files.
_SHOWN_FIELDS = (
    "http.request.method", "http.route", "http.response.status_code", "duration_ms", "model", "executed_by",
    "member", "peer", "address", "attempts", "reason", "error.message",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class LocalMesh:
    """What to start: node-1 … node-N on consecutive ports of 127.0.0.1."""

    nodes: int
    http_port: int
    mesh_port: int
    models: tuple[str, ...]
    slots: int | None
    data_dir: Path
    log_dir: Path
    config: Path | None

    def url(self, index: int) -> str:
        return f"http://127.0.0.1:{self.http_port + index - 1}"

    def needs_key(self) -> bool:
        """Some node has kept an API key, also a revoked one: then all demand one."""
        folders = [self.data_dir / f"node-{index}" for index in range(1, self.nodes + 1)]
        return any(holds_records(folder, RECORD_PREFIX) for folder in folders)

    def command(self, index: int) -> list[str]:
        """The command line of node `index`, counted from 1. Every node is told all others, so any may start first."""
        others = [i for i in range(1, self.nodes + 1) if i != index]
        threads = max(1, (os.cpu_count() or 1) // self.nodes)
        command = [sys.executable, "-m", "nodes", "serve"]
        command += ["--name", f"node-{index}", "--data-dir", str(self.data_dir / f"node-{index}")]
        command += ["--http", f"127.0.0.1:{self.http_port + index - 1}"]
        command += ["--mesh", f"127.0.0.1:{self.mesh_port + index - 1}"]
        for other in others:
            command += ["--join", f"127.0.0.1:{self.mesh_port + other - 1}"]
        for model in self.models:
            command += ["--model", model]
        if self.slots is not None:
            command += ["--slots", str(self.slots)]
        if self.config is not None:
            command += ["--config", str(self.config)]
        return [*command, "--threads", str(threads), "--no-spinning", "--log-console", "json"]


@dataclass(slots=True)
class _Child:
    index: int
    process: trio.Process
    colour: str
    is_ready: bool = False
    last_words: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"node-{self.index}"


def run_local_mesh(mesh: LocalMesh) -> int:
    """Run until Ctrl-C or SIGTERM. The exit code: 0 after a stop asked for, 1 when every node died,
    2 when a node could not start as configured."""
    # Checked here for one line about a fault instead of one from every node.
    drain_s = load_config(mesh.config, os.environ, {}).drain_s
    _check_ports(mesh)
    for folder in (mesh.data_dir, mesh.log_dir):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise ConfigInvalid(f"{folder}: {exc.strerror}; give a writable folder") from exc
    return trio.run(_Supervisor(mesh, drain_s).run)


def _check_ports(mesh: LocalMesh) -> None:
    """Before any node starts, or the first ones would join whatever runs on the ports of the others."""
    for index in range(mesh.nodes):
        try:
            bind_http(Address("127.0.0.1", mesh.http_port + index)).close()
            for bound in bind_mesh(Address("127.0.0.1", mesh.mesh_port + index)):
                bound.close()
        except ConfigInvalid as exc:
            raise ConfigInvalid(f"{exc}; for `up` these are --http-port and --mesh-port") from exc


class _Supervisor:
    def __init__(self, mesh: LocalMesh, drain_s: float) -> None:
        self._mesh = mesh
        self._drain_s = drain_s
        self._console = Console(highlight=False, soft_wrap=True)
        self._children: list[_Child] = []
        self._exit_code = 0
        self._is_stopping = False

    async def run(self) -> int:
        with LogMerger(self._mesh.log_dir) as logs:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._stop_on_signal, nursery)
                try:
                    await self._run_children(logs)
                finally:
                    self._kill()
                nursery.cancel_scope.cancel()
        return self._exit_code

    async def _run_children(self, logs: LogMerger) -> None:
        async with trio.open_nursery() as children:
            for index in range(1, self._mesh.nodes + 1):
                if self._is_stopping:
                    return
                child = await self._start(index)
                self._children.append(child)
                children.start_soon(self._follow, child, logs)
                children.start_soon(self._await_end, child)

    async def _start(self, index: int) -> _Child:
        environment = os.environ | {"AI_CLUSTER_STOP_WITH_STDIN": "true", "PYTHONUNBUFFERED": "1"}
        process = await trio.lowlevel.open_process(
            self._mesh.command(index),
            stdin=subprocess.PIPE,  # never written: its end tells the child that this process is gone
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # a Ctrl-C reaches this process alone, which then stops the nodes in order
        )
        return _Child(index, process, _COLOURS[(index - 1) % len(_COLOURS)])

    async def _follow(self, child: _Child, logs: LogMerger) -> None:
        assert child.process.stderr is not None
        pending = b""
        async for data in child.process.stderr:
            *lines, pending = (pending + data).split(b"\n")
            if len(pending) > LINE_BYTES_MAX:
                lines.append(pending)
                pending = b""
            for line in lines:
                if line.strip():
                    logs.write_line(line, child.name)
                    self._show(child, line)

    def _show(self, child: _Child, line: bytes) -> None:
        text = Text(f"{child.name} | ", style=child.colour)
        try:
            record = json.loads(line)
            level, message = str(record["level"]), str(record["message"])
        except (ValueError, KeyError, TypeError):
            plain = line.decode(errors="replace")
            child.last_words.append(plain)
            del child.last_words[:-5]
            self._console.print(text.append(plain, style="default"))
            return
        text.append(message, style=_LEVEL_STYLES.get(level, "default"))
        for name in _SHOWN_FIELDS:
            if name in record:
                text.append(f" {name.rpartition('.')[2]}={record[name]}", style="dim")
        self._console.print(text)
        if message == NODE_READY and not child.is_ready:
            child.is_ready = True
            ready, nodes = sum(other.is_ready for other in self._children), self._mesh.nodes
            self._say(f"{child.name} is ready ({ready} of {nodes}): {self._mesh.url(child.index)}", "bold")
            if ready == nodes:
                self._console.print(greeting(self._mesh, _own_command()), style="bold", markup=False)

    async def _await_end(self, child: _Child) -> None:
        code = await child.process.wait()
        if self._is_stopping:
            return
        if code == 2 and not child.is_ready:
            self._exit_code = 2
            self._say(f"{child.name} cannot run as configured; stopping the others", "bold red")
            self._terminate()
            return
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        self._say(f"{child.name} ended ({how}); the mesh goes on without it", "bold yellow")
        if all(other.process.returncode is not None for other in self._children):
            self._exit_code = 1
            self._say("every node has ended", "bold red")

    async def _stop_on_signal(self, nursery: trio.Nursery) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                if self._is_stopping:
                    self._say("killing the nodes that are still running", "bold red")
                    self._kill()
                    return
                self._say("stopping; running streams may finish (again Ctrl-C: kill)", "bold")
                self._terminate()
                nursery.start_soon(self._kill_late)

    async def _kill_late(self) -> None:
        """A node that outlives its own drain time is stuck."""
        await trio.sleep(self._drain_s + STOP_GRACE_S)
        self._kill()

    def _terminate(self) -> None:
        self._is_stopping = True
        for child in self._children:
            if child.process.returncode is None:
                child.process.terminate()

    def _kill(self) -> None:
        for child in self._children:
            if child.process.returncode is None:
                child.process.kill()

    def _say(self, message: str, style: str) -> None:
        self._console.print(f"ai-cluster | {message}", style=style)


def greeting(mesh: LocalMesh, command: str) -> str:
    """What to do with a mesh whose nodes are ready. command: how this program is called."""
    url = mesh.url(1)
    key = " --api-key sk-…" if mesh.needs_key() else ""
    urls = [mesh.url(number) for number in range(1, mesh.nodes + 1)]
    ready = f"{mesh.nodes} nodes are ready, each answers for all" if mesh.nodes > 1 else "the node is ready"
    lines = [
        f"\n{ready}: {', '.join(urls)}",
        f'  ask:   {command} chat --url {url}{key} "How do I add a node?"',
        f"  look:  {command} status --url {url}",
        "  stop:  Ctrl-C\n",
    ]
    if key:
        make = f"{command} keys create --name NAME --url {url} --data-dir {shlex.quote(str(mesh.data_dir))}"
        lines.insert(1, f"  key:   API keys were made here, so every request needs one; a new one: {make}")
    return "\n".join(lines)


def _own_command() -> str:
    """How this program was called, for lines that are copied into another terminal."""
    called = Path(sys.argv[0])
    if called.name != "ai-cluster":
        return f"{Path(sys.executable).name} -m nodes"
    return os.path.relpath(called) if called.is_absolute() and called.is_relative_to(Path.cwd()) else str(called)
