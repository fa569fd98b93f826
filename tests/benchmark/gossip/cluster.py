"""One agent of one kind in each namespace, and what they say they see of each other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import trio

from tests.benchmark.gossip.agents import Kind, State
from tests.benchmark.gossip.namespaces import Network

START_TIMEOUT_S = 120.0  # of one agent among many that start at once on few cores
LINES_KEPT = 20  # of an agent's log, shown if it ends by itself
LINE_BYTES_MAX = 1_000_000


class What(StrEnum):
    """What an agent saw of another one; the values are serf's words."""

    JOINED = "EventMemberJoin"
    UPDATED = "EventMemberUpdate"
    SUSPECTED = "Suspect"
    FAILED = "EventMemberFailed"
    LEFT = "EventMemberLeave"


_SIGHTING = re.compile(rb"\b(EventMember(?:Join|Update|Failed|Leave)|Suspect):? n(\d+)\b")


@dataclass(frozen=True, slots=True)
class Sighting:
    """at: seconds on trio's clock when the line was read."""

    at: float
    observer: int
    what: What
    subject: int


@dataclass(slots=True)
class Agent:
    """A running process. It is killed by us, or its end is a fault."""

    process: trio.Process
    running: trio.Event = field(default_factory=trio.Event)
    started_at: float = 0.0  # when it said that it runs
    is_killed: bool = False
    lines: deque[bytes] = field(default_factory=lambda: deque(maxlen=LINES_KEPT))


class AgentEnded(Exception):
    """An agent ended that nobody killed."""


class Cluster:
    """The agents of one kind. nursery: owns the tasks that read what they say, and dies with an agent that ends."""

    def __init__(self, kind: Kind, network: Network, nursery: trio.Nursery) -> None:
        self.kind = kind
        self.network = network
        self.agents: dict[int, Agent] = {}
        self.sightings: list[Sighting] = []
        self._nursery = nursery
        self._news = trio.Event()

    async def start(self, index: int) -> Agent:
        """Start the agent of one namespace; node 0 is everybody else's seed."""
        seed_host = self.network.host(0) if index else None
        command = self.kind.command(index, self.network.host(index), seed_host)
        process = await trio.lowlevel.open_process(
            self.network.inside(index, command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us; we end the agents
        )
        agent = self.agents[index] = Agent(process)
        self._nursery.start_soon(self._read, index, agent)
        return agent

    async def wait_running(self, agents: Iterable[Agent]) -> float:
        """Until all say that they run; when the last one did. Raises trio.TooSlowError."""
        with trio.fail_after(START_TIMEOUT_S):
            for agent in agents:
                await agent.running.wait()
        return max(agent.started_at for agent in self.agents.values())

    async def kill(self, index: int) -> float:
        """SIGKILL. Returns when."""
        agent = self.agents.pop(index)
        agent.is_killed = True
        at = trio.current_time()
        agent.process.kill()
        await agent.process.wait()
        await self.kind.forget(index)
        return at

    async def kill_all(self) -> None:
        for agent in self.agents.values():
            agent.is_killed = True
            agent.process.kill()
        for agent in self.agents.values():
            await agent.process.wait()

    async def change(self, index: int, state: State, text: str) -> float:
        """Change a node's state. Returns when it was told to. Raises ChangeRefused."""
        stdin = self.agents[index].process.stdin
        assert stdin is not None
        at = trio.current_time()
        await self.kind.change(index, self.network.host(index), stdin, state, text)
        return at

    def seen(self, since: float, *whats: What) -> list[Sighting]:
        """What was seen from a time on, oldest first."""
        start = len(self.sightings)
        while start and self.sightings[start - 1].at >= since:
            start -= 1
        return [s for s in self.sightings[start:] if s.what in whats]

    def first_seen(self, since: float, what: What, subject: int) -> dict[int, float]:
        """By observer, how long after `since` it first saw that."""
        found: dict[int, float] = {}
        for sighting in self.seen(since, what):
            if sighting.subject == subject:
                found.setdefault(sighting.observer, sighting.at - since)
        return found

    async def wait_until(self, holds: Callable[[], bool], timeout_s: float) -> bool:
        """Looks after each thing seen. False when the time is over."""
        with trio.move_on_after(timeout_s):
            while not holds():
                self._news = trio.Event()
                await self._news.wait()
            return True
        return False

    def cpu_s(self) -> dict[int, float]:
        """CPU seconds of each agent so far, from /proc."""
        ticks = os.sysconf("SC_CLK_TCK")
        times = {}
        for index, agent in self.agents.items():
            # utime and stime are fields 14 and 15; the command before them may hold spaces (proc(5)).
            fields = Path(f"/proc/{agent.process.pid}/stat").read_text().rpartition(")")[2].split()
            times[index] = (int(fields[11]) + int(fields[12])) / ticks
        return times

    async def _read(self, index: int, agent: Agent) -> None:
        """All that the agent says, until it ends. Raises AgentEnded unless it was killed."""
        buffer = b""
        assert agent.process.stdout is not None
        async for data in agent.process.stdout:
            now = trio.current_time()
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                agent.lines.append(line)
                self._take(index, agent, line, now)
            buffer = buffer[-LINE_BYTES_MAX:]
        if not agent.is_killed:
            for line in agent.lines:
                print(line.decode(errors="replace"), file=sys.stderr)
            raise AgentEnded(f"{self.kind.label} agent n{index} ended by itself; its last lines are above")

    def _take(self, index: int, agent: Agent, line: bytes, now: float) -> None:
        if not agent.running.is_set() and self.kind.running.encode() in line:
            agent.started_at = now
            agent.running.set()
        found = _SIGHTING.search(line)
        if found is not None and int(found[2]) != index:
            self.sightings.append(Sighting(now, index, What(found[1].decode()), int(found[2])))
            self._news.set()
