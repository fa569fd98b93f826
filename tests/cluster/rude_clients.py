"""`python -m tests.cluster.rude_clients`: do clients that misbehave cost others anything? One JSON line of figures.

Some stop reading, some leave in the middle, some send a byte a second, while a few polite ones stream. The polite ones
are measured alone first, then beside as many ordinary clients as there will be rude ones whose requests are answered,
then beside the rude ones. Exit status 1 where one of these does not hold:

  free            at the end no slot, queue or stream is taken at any node
  free_while_held no slot or place in a queue is taken this many seconds after the last client stopped reading, though
                  all of them still hold their connections: at most STALLED_S
  gap_p99_ratio   99th percentile of the polite clients' time between two texts: at most 1.5 times the same alone
  polite          none of their streams fails
  memory          resident memory of each node when all is over: at most 10 % more than before the rude came
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import trio

from nodes import garbage
from tests.cluster.figures import finish, free_after_s, law, progress, quantile, quantiles, rss_mib
from tests.cluster.mesh import Mesh, NodeProcess
from tests.cluster.stream_client import POLITE, Answer, Manners, ask

POLITE_TOKENS = 300
RUDE_TOKENS = 900
STOP_AFTER_FRAMES = 3
BYTE_INTERVAL_S = 1.0
# A client that takes nothing is closed after 20 s; then a step of the engine.
STALLED_S = 25.0
FREE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Options:
    """spread_s: rude clients arrive within this time. alone_s: for which the polite ones are measured undisturbed."""

    nodes: int
    stopped: int
    leaving: int
    slow: int
    polite: int
    spread_s: float
    alone_s: float
    seed: int


@dataclass(slots=True)
class _Watched:
    """Of polite clients: seconds between two texts, and to the first."""

    gaps: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    streams: int = 0
    faults: list[str] = field(default_factory=list)

    def take(self, answer: Answer) -> None:
        self.streams += 1
        if answer.ending != "done":
            self.faults.append(str(answer.error))
        self.gaps += [b - a for a, b in pairwise(answer.text_times)]
        if answer.first_text_s is not None:
            self.first.append(answer.first_text_s)

    def figures(self) -> dict[str, Any]:
        return {
            "streams": self.streams,
            "gap_ms": quantiles(self.gaps, 1e3),
            "first_text_ms": quantiles(self.first, 1e3),
            "faults": self.faults,
        }


class _Rude:
    def __init__(self, nodes: list[NodeProcess], options: Options) -> None:
        self._nodes = nodes
        self._options = options
        self._rng = random.Random(options.seed)
        self._endings: dict[str, Counter[str]] = {kind: Counter() for kind in ("stopped", "leaving", "slow")}
        self._answer_chars = 0
        self._last_stopped_at = 0.0
        self._held_free_s: float | None = None

    async def run(self) -> dict[str, Any]:
        options = self._options
        whole = await ask(self._nodes[0].http, _body(RUDE_TOKENS))
        assert whole.ending == "done", whole.error
        self._answer_chars = len(whole.choices[0].text)
        progress("polite clients alone")
        async with self._polite() as alone:
            await trio.sleep(options.alone_s)
        progress("beside ordinary clients")
        async with self._polite() as crowded:
            await self._arrive([self._ordinary] * (options.stopped + options.leaving))
        memory = [rss_mib(self._nodes)]
        progress("beside rude clients")
        async with self._polite() as disturbed:
            await self._be_rude()
        busy = await trio.to_thread.run_sync(free_after_s, self._nodes, FREE_TIMEOUT_S)
        memory.append(rss_mib(self._nodes))
        growth = max(memory[1][name] / memory[0][name] - 1 for name in memory[0])
        return {
            "seed": options.seed,
            "nodes": options.nodes,
            "alone": alone.figures(),
            "beside_ordinary": crowded.figures(),
            "beside_rude": disturbed.figures(),
            "gap_p99_ratio_to_ordinary": _ratio(disturbed, crowded),
            "endings": {kind: dict(endings) for kind, endings in self._endings.items()},
            "closed_by_nodes_for_not_reading": sum(map(_closed, self._nodes)),
            "taken_at_the_end": busy[1],
            "free_after_s": round(busy[0], 2),
            "rss_mib": dict(zip(("before", "after"), memory, strict=True)),
            "laws": {
                "free": law(sum(busy[1].values()), at_most=0),
                "free_while_held": law(self._held_free_s, at_most=STALLED_S),
                "gap_p99_ratio": law(_ratio(disturbed, alone), at_most=1.5),
                "polite": law(len(disturbed.faults), at_most=0),
                "memory": law(growth, at_most=0.1),
            },
        }

    @asynccontextmanager
    async def _polite(self) -> AsyncIterator[_Watched]:
        """While it is entered, polite clients stream, one answer after the other."""
        watched, stop = _Watched(), trio.Event()

        async def client(entry: NodeProcess) -> None:
            while not stop.is_set():
                watched.take(await ask(entry.http, _body(POLITE_TOKENS)))

        async with trio.open_nursery() as nursery:
            for number in range(self._options.polite):
                nursery.start_soon(client, self._nodes[number % len(self._nodes)])
            yield watched
            stop.set()

    async def _arrive(self, clients: list[Callable[[], Coroutine[Any, Any, None]]]) -> None:
        """Begin all within spread_s, in random order, and wait until they are over."""
        self._rng.shuffle(clients)
        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(client)
                await trio.sleep(self._options.spread_s / len(clients))

    async def _be_rude(self) -> None:
        options = self._options
        kinds = [self._stopped] * options.stopped + [self._leaving] * options.leaving
        async with trio.open_nursery() as slow:
            for _ in range(options.slow):
                slow.start_soon(self._slow)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._arrive, kinds)
                nursery.start_soon(self._watch_held)
            slow.cancel_scope.cancel()

    async def _watch_held(self) -> None:
        """How long after the last client stopped reading its node is rid of it, while it holds its connection."""
        await trio.sleep(self._options.spread_s)
        # The polite ones still stream: their slots are not what is looked for.
        while self._options.stopped:
            taken = [await trio.to_thread.run_sync(_taken, node) for node in self._nodes]
            if sum(taken) <= self._options.polite:
                self._held_free_s = max(0.0, time.monotonic() - self._last_stopped_at)
                return
            await trio.sleep(0.25)

    async def _ordinary(self) -> None:
        await self._ask(RUDE_TOKENS, POLITE)

    async def _stopped(self) -> None:
        # Held longer than a node has patience.
        manners = Manners(stop_after=STOP_AFTER_FRAMES, stop_s=STALLED_S + self._options.spread_s)
        answer = Answer(time.monotonic())
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                while len(answer.frames) < STOP_AFTER_FRAMES:
                    await trio.sleep(0.1)
                self._last_stopped_at = max(self._last_stopped_at, time.monotonic())

            nursery.start_soon(watch)
            await self._ask(RUDE_TOKENS, manners, answer)
            nursery.cancel_scope.cancel()
        self._endings["stopped"][answer.ending] += 1

    async def _leaving(self) -> None:
        answer = await self._ask(RUDE_TOKENS, Manners(leave_after=self._rng.randint(1, self._answer_chars)))
        self._endings["leaving"][answer.ending] += 1

    async def _slow(self) -> None:
        answer = Answer(time.monotonic())
        try:
            await self._ask(1, Manners(byte_interval_s=BYTE_INTERVAL_S), answer)
        finally:
            self._endings["slow"][answer.ending if answer.ended_at else "still sending"] += 1

    async def _ask(self, tokens: int, manners: Manners, answer: Answer | None = None) -> Answer:
        return await ask(self._rng.choice(self._nodes).http, _body(tokens), manners=manners, answer=answer)


def _closed(node: NodeProcess) -> int:
    return (node.folder / "logs" / "combined.log").read_text().count("closed a connection whose client does not read")


def _taken(node: NodeProcess) -> float:
    return node.metric("ai_cluster_engine_slots", state="active") + node.metric("ai_cluster_engine_queue_depth")


def _ratio(one: _Watched, other: _Watched) -> float | None:
    a, b = quantile(one.gaps, 0.99), quantile(other.gaps, 0.99)
    return None if a is None or not b else round(a / b, 3)


def _body(tokens: int) -> dict[str, Any]:
    return {
        "model": "demo",
        "messages": [{"role": "user", "content": "What happens when a node dies?"}],
        "stream": True,
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": True,
    }


async def run(folder: Path, options: Options) -> dict[str, Any]:
    mesh = Mesh(folder)
    try:
        for _ in range(options.nodes):
            mesh.add()
        mesh.wait_until_agreed()
        return await _Rude(mesh.nodes, options).run()
    finally:
        mesh.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--stopped", type=int, default=200, help="clients that stop reading")
    parser.add_argument("--leaving", type=int, default=200, help="clients that leave at a random token")
    parser.add_argument("--slow", type=int, default=50, help="clients that send a byte a second")
    parser.add_argument("--polite", type=int, default=4, help="clients that are measured")
    parser.add_argument("--spread-s", type=float, default=60.0, help="time within which rude clients arrive")
    parser.add_argument("--alone-s", type=float, default=20.0, help="time for which the polite are measured alone")
    parser.add_argument("--seed", type=int, default=7)
    options = Options(**vars(parser.parse_args()))
    progress(f"seed {options.seed}")
    garbage.settle()  # this client's own pauses would look like the mesh's
    with tempfile.TemporaryDirectory() as folder:
        figures = trio.run(run, Path(folder), options)
    finish(figures)


if __name__ == "__main__":
    main()
