"""Kills, stops and restarts the nodes of a mesh at random, and remembers what it did to whom and when."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import trio

from tests.cluster.mesh import NodeProcess

UP_MIN = 2  # nodes that are left alone at any time
BETWEEN_S = (1.5, 4.0)
DOWN_S = (0.5, 2.0)
STOPPED_S = (1.0, 6.0)
STOP_SHARE = 0.5
KILLED_WHILE_STOPPED_SHARE = 0.3


@dataclass(slots=True)
class Harm:
    """Times are of time.monotonic(). over_at: when the node ran again, or was ready again; None while it does not."""

    node: str
    kind: Literal["kill", "stop"]
    begun_at: float
    killed_at: float | None = None
    over_at: float | None = None

    def touches(self, start: float, end: float) -> bool:
        return self.begun_at <= end and (self.over_at is None or self.over_at >= start)


class Disturber:
    """Harms nodes until `finished`, then lets all of them run again.

    before_kill: called with each node that is about to be killed while it runs, so that its counts can be kept.
    """

    def __init__(
        self, nodes: list[NodeProcess], rng: random.Random, before_kill: Callable[[NodeProcess], None]
    ) -> None:
        self.harms: list[Harm] = []
        self.finished = trio.Event()
        self._nodes = nodes
        self._rng = rng
        self._before_kill = before_kill
        self._condemned: set[str] = set()  # chosen, and not harmed yet

    def up(self) -> list[NodeProcess]:
        harmed = {harm.node for harm in self.harms if harm.over_at is None}
        return [node for node in self._nodes if node.name not in harmed | self._condemned]

    def touched(self, node: str, start: float, end: float) -> list[Harm]:
        return [harm for harm in self.harms if harm.node == node and harm.touches(start, end)]

    async def run(self, harms_max: int | None = None) -> None:
        """Returns when `finished` is set and every node is ready. harms_max: how many there may be at most."""
        async with trio.open_nursery() as nursery:
            while not await self._pause(BETWEEN_S):
                up = self.up()
                count = len(self.harms) + len(self._condemned)
                if len(up) <= UP_MIN or (harms_max is not None and count >= harms_max):
                    continue
                is_stop = self._rng.random() < STOP_SHARE
                if harms_max is not None:  # few of them: each kind has its turn
                    is_stop = count % 2 == 1
                node = self._rng.choice(up)
                self._condemned.add(node.name)
                nursery.start_soon(self._stop if is_stop else self._kill, node)

    def _begin(self, node: NodeProcess, kind: Literal["kill", "stop"]) -> Harm:
        harm = Harm(node.name, kind, time.monotonic())
        self.harms.append(harm)
        self._condemned.discard(node.name)
        return harm

    async def _kill(self, node: NodeProcess) -> None:
        await trio.to_thread.run_sync(self._before_kill, node)
        await self._kill_and_restart(node, self._begin(node, "kill"))

    async def _stop(self, node: NodeProcess) -> None:
        harm = self._begin(node, "stop")
        os.kill(node.pid, signal.SIGSTOP)
        is_finished = await self._pause(STOPPED_S)
        if not is_finished and self._rng.random() < KILLED_WHILE_STOPPED_SHARE:
            await self._kill_and_restart(node, harm)
            return
        os.kill(node.pid, signal.SIGCONT)
        harm.over_at = time.monotonic()

    async def _kill_and_restart(self, node: NodeProcess, harm: Harm) -> None:
        harm.killed_at = time.monotonic()
        await trio.to_thread.run_sync(node.kill)
        await self._pause(DOWN_S)
        await trio.to_thread.run_sync(node.start, *(other.mesh for other in self._nodes if other is not node))
        harm.over_at = time.monotonic()

    async def _pause(self, between_s: tuple[float, float]) -> bool:
        """True where it was ended by `finished`."""
        with trio.move_on_after(self._rng.uniform(*between_s)):
            await self.finished.wait()
        return self.finished.is_set()
