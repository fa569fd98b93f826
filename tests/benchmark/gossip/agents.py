"""The kinds of agents that can be measured: how one is started, and how it is told to change its state."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import msgpack
import trio

from tests.benchmark.gossip.agent import RUNNING

KEY = "A" * 43 + "="  # 32 zero bytes: the benchmark's namespaces hold no secrets
RPC_PORT = 7373
RPC_TIMEOUT_S = 15.0
READ_BYTES = 65_536


class State(StrEnum):
    """What of a node's state changes: what it serves, or how busy it is. The values are our agent's commands."""

    PROFILE = "profile"
    LOAD = "load"


class Kind(Protocol):
    """One kind. label: of its rows; port: of its gossip; running: what a line holds once the agent takes part.

    states: what it tells apart; an agent that has one kind of state changes that for either."""

    label: str
    port: int
    running: str
    states: tuple[State, ...]

    def command(self, index: int, host: str, seed_host: str | None) -> list[str]:
        """What to run for node `index`; seed_host None: the first one."""
        ...

    async def change(self, index: int, host: str, stdin: trio.abc.SendStream, state: State, text: str) -> None:
        """Change the node's state to one of about len(text) bytes. Raises ChangeRefused."""
        ...

    async def forget(self, index: int) -> None:
        """The node's process is gone."""
        ...


class ChangeRefused(Exception):
    """The agent says that it could not publish the change."""


@dataclass(slots=True)
class Ours:
    label: str = "ours"
    port: int = 7946
    running: str = RUNNING
    states: tuple[State, ...] = (State.PROFILE, State.LOAD)

    def command(self, index: int, host: str, seed_host: str | None) -> list[str]:
        seed = "-" if seed_host is None else f"{seed_host}:{self.port}"
        module = "tests.benchmark.gossip.agent"
        return [sys.executable, "-m", module, f"n{index}", f"{host}:{self.port}", seed, KEY]

    async def change(self, index: int, host: str, stdin: trio.abc.SendStream, state: State, text: str) -> None:
        await stdin.send_all(f"{state} {text}\n".encode())

    async def forget(self, index: int) -> None:
        await trio.lowlevel.checkpoint()


@dataclass(slots=True)
class Serf:
    """HashiCorp's serf with memberlist's LAN profile. Its tags stand for our load: the state it can gossip."""

    label: str = "serf"
    port: int = 7947
    running: str = "agent: Serf agent starting"
    states: tuple[State, ...] = (State.PROFILE,)
    _clients: dict[int, _RpcClient] = field(default_factory=dict)

    def command(self, index: int, host: str, seed_host: str | None) -> list[str]:
        command = ["serf", "agent", f"-node=n{index}", f"-bind={host}:{self.port}", "-profile=lan", "-log-level=info"]
        command.append(f"-rpc-addr={host}:{RPC_PORT}")
        if seed_host is not None:
            command += [f"-retry-join={seed_host}:{self.port}", "-retry-interval=1s"]
        return command

    async def change(self, index: int, host: str, stdin: trio.abc.SendStream, state: State, text: str) -> None:
        client = self._clients.get(index)
        if client is None:
            client = self._clients[index] = await _RpcClient.open(host)
        await client.call("tags", {"Tags": {"v": text}, "DeleteTags": []})

    async def forget(self, index: int) -> None:
        client = self._clients.pop(index, None)
        if client is not None:
            await client.stream.aclose()
        await trio.lowlevel.checkpoint()


def installed() -> list[Kind]:
    return [Ours(), *([Serf()] if shutil.which("serf") else [])]


class _RpcClient:
    """serf's RPC: msgpack objects over TCP, a header and a body each way."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._sequence = 0
        self._unpacker = msgpack.Unpacker(raw=False, strict_map_key=False)

    @classmethod
    async def open(cls, host: str) -> _RpcClient:
        client = cls(await trio.open_tcp_stream(host, RPC_PORT))
        await client.call("handshake", {"Version": 1})
        return client

    async def call(self, command: str, body: dict[str, Any]) -> None:
        """Returns when the agent has answered, which for tags is after its broadcast. Raises ChangeRefused."""
        header = {"Command": command, "Seq": self._sequence}
        self._sequence += 1
        with trio.fail_after(RPC_TIMEOUT_S):
            await self.stream.send_all(msgpack.packb(header) + msgpack.packb(body))
            while True:
                for answer in self._unpacker:
                    if answer["Error"]:
                        raise ChangeRefused(answer["Error"])
                    return
                data = await self.stream.receive_some(READ_BYTES)
                if not data:
                    raise ChangeRefused("the agent closed its RPC connection")
                self._unpacker.feed(data)
