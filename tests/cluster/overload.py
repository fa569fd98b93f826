"""`python -m tests.cluster.overload`: a mesh that is offered four times what it can do. One JSON line of figures.

First the maximum: a closed loop of just enough clients, before and after the overload, since the machine may change
meanwhile. Then requests arrive at four times that rate (Poisson, open loop) at all entries. Who is refused comes back
when Retry-After says, as often as it is refused, until ATTEMPTS_MAX: what each refusal told, against when its client
was let in, is the error of Retry-After. Everything runs on this machine, this client included, which therefore asks for
whole answers, and goes before the nodes where it may, as if it had a machine of its own. An HTTP request costs its node
about 2 ms of CPU, refused or not: where engines use every core, what is refused takes from what is served, the more the
shorter answers are. Exit status 1 where one of these does not hold:

  goodput        tokens a second while overloaded, of the maximum: at least 0.95
  refusal_ms     every refusal within 50 ms of the client's connecting
  retry_after    median relative error of Retry-After, of all refusals: at most 0.5. Nobody is told more than 59 s,
                 since clients would not believe it; the figures have those who were told less apart, too
  memory         resident memory of each node from the middle to the end: at most 5 % more
  faults         nothing but whole answers and refusals with Retry-After: no other status, no broken connection
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import trio

from mesh.retry_after import RETRY_AFTER_MAX_S
from nodes import garbage
from tests.cluster.figures import finish, law, progress, quantiles, rss_mib
from tests.cluster.mesh import Mesh, NodeProcess
from tests.cluster.stream_client import Answer, ask

ATTEMPTS_MAX = 8
# Clients come back a little later than told, as clients do, so that none comes too early by a rounding.
RETRY_JITTER_S = 0.2
WARM_UP_S = 3.0
# Until everybody has been let in, at most: four times the maximum for a minute is three minutes' work left over. Who
# has not been let in by then is counted as undecided where its first time has come, and not at all where it has not.
SETTLE_S = 240.0
# Of this client: better than the nodes', who have 0.
NICENESS = -10
# Of the time offered, what is not counted at its beginning: the queues fill.
RAMP_SHARE = 0.1
FAULTS_KEPT = 20
# The error that counts for a client that was never let in.
ERROR_NEVER = 100.0


@dataclass(frozen=True, slots=True)
class Options:
    nodes: int
    entries: int
    slots: int
    queue: int
    tokens: int
    seconds: float
    maximum_s: float
    factor: float
    seed: int


@dataclass(slots=True)
class _Tally:
    """done: (when, tokens) of whole answers. refusal_s: from connecting to the refusal. told_and_let_in: what a refusal
    said and when the request was let in, in seconds from that refusal. late_s: by which this client itself was late."""

    done: list[tuple[float, int]] = field(default_factory=list)
    refusal_s: list[float] = field(default_factory=list)
    told_and_let_in: list[tuple[float, float]] = field(default_factory=list)
    never_let_in: int = 0
    undecided: int = 0
    let_in_at_attempt: Counter[int] = field(default_factory=Counter)
    late_s: list[float] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    fault_count: int = 0


class _Overload:
    def __init__(self, nodes: list[NodeProcess], options: Options) -> None:
        self._nodes = nodes
        self._options = options
        self._rng = random.Random(options.seed)
        self._entries: Iterator[NodeProcess] = cycle(nodes)
        self._number = 0

    async def run(self) -> dict[str, Any]:
        options = self._options
        await self._closed_loop(WARM_UP_S)
        before = await self._closed_loop(options.maximum_s)
        progress(f"maximum: {before:.0f} tokens/s")
        tally, memory, offered = await self._open_loop(options.factor * before / options.tokens)
        after = await self._closed_loop(options.maximum_s)
        progress(f"maximum afterwards: {after:.0f} tokens/s")
        return self._figures(tally, memory, before, after, offered)

    async def _closed_loop(self, seconds: float) -> float:
        """Tokens a second with every slot in use and one request more for each node that serves."""
        tally = _Tally()
        started = time.monotonic()

        async def client(entry: NodeProcess) -> None:
            while True:
                self._count(tally, await ask(entry.http, self._body()))

        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:
                for _ in range((self._options.slots + 1) * self._options.nodes):
                    nursery.start_soon(client, next(self._entries))
        return sum(tokens for _, tokens in tally.done) / (time.monotonic() - started)

    async def _open_loop(self, rate: float) -> tuple[_Tally, list[dict[str, float]], tuple[float, float, int]]:
        """The tally; memory at the start, the middle, the end; begin and end of what counts, and how many arrived."""
        tally = _Tally()
        memory = [rss_mib(self._nodes)]
        seconds = self._options.seconds
        started = time.monotonic()
        offset = trio.current_time() - started
        due, arrived = started, 0
        progress(f"offering {rate:.1f} requests/s for {seconds:g} s")
        async with trio.open_nursery() as clients:
            while due < started + seconds:
                due += self._rng.expovariate(rate)
                await trio.sleep_until(due + offset)
                tally.late_s.append(time.monotonic() - due)
                clients.start_soon(self._insist, next(self._entries), tally)
                arrived += 1
                if len(memory) == 1 and due >= started + seconds / 2:
                    memory.append(rss_mib(self._nodes))
                    progress(f"{len(tally.done)} answers, {len(tally.refusal_s)} refusals")
            ended = time.monotonic()
            memory.append(rss_mib(self._nodes))
            progress("waiting for those who were told to come back")
            clients.cancel_scope.deadline = trio.current_time() + SETTLE_S
        return tally, memory, (started + seconds * RAMP_SHARE, ended, arrived)

    async def _insist(self, entry: NodeProcess, tally: _Tally) -> None:
        """One client: comes back when it was told to."""
        body = self._body()
        refusals: list[tuple[float, float]] = []  # when, and what it was told
        for attempt in range(ATTEMPTS_MAX):
            try:
                answer = await ask(entry.http, body)
            except trio.Cancelled:
                tally.undecided += attempt > 0
                raise
            self._count(tally, answer)
            if answer.status != 503 or answer.retry_after_s is None:
                if attempt and answer.status == 200:
                    tally.told_and_let_in += [(told_s, answer.started_at - at) for at, told_s in refusals]
                    tally.let_in_at_attempt[attempt] += 1
                return
            refusals.append((answer.ended_at, answer.retry_after_s))
            try:
                await trio.sleep(answer.retry_after_s + self._rng.uniform(0, RETRY_JITTER_S))
            except trio.Cancelled:
                tally.undecided += attempt > 0
                raise
        tally.never_let_in += 1

    def _body(self) -> dict[str, Any]:
        """Each its own, so that a client that comes back is known by it."""
        self._number += 1
        return {
            "model": "demo",
            "messages": [{"role": "user", "content": f"Question {self._number}: how do I add a node?"}],
            "temperature": 0,
            "max_tokens": self._options.tokens,
            "ignore_eos": True,
        }

    @staticmethod
    def _count(tally: _Tally, answer: Answer) -> None:
        if answer.status == 200 and answer.ending == "done":
            tally.done.append((answer.ended_at, json.loads(answer.body)["usage"]["completion_tokens"]))
        elif answer.status == 503 and answer.retry_after_s is not None:
            tally.refusal_s.append(answer.ended_at - answer.started_at)
        else:
            tally.fault_count += 1
            if len(tally.faults) < FAULTS_KEPT:
                tally.faults.append({"ending": answer.ending, "status": answer.status, "error": answer.error})

    def _figures(
        self,
        tally: _Tally,
        memory: list[dict[str, float]],
        before: float,
        after: float,
        offered: tuple[float, float, int],
    ) -> dict[str, Any]:
        options = self._options
        begin, end, arrived = offered
        goodput = sum(tokens for at, tokens in tally.done if begin <= at <= end) / (end - begin)
        maximum = (before + after) / 2
        errors = [abs(let_in_s - told_s) / told_s for told_s, let_in_s in tally.told_and_let_in]
        errors += [ERROR_NEVER] * (tally.never_let_in + tally.undecided)
        growth = max(memory[2][name] / memory[1][name] - 1 for name in memory[1])
        refusal = quantiles(tally.refusal_s, 1e3)
        return {
            "seed": options.seed,
            "nodes": options.nodes,
            "entries": options.entries,
            "slots": options.slots,
            "queue": options.queue,
            "tokens": options.tokens,
            "seconds": options.seconds,
            "maximum_tokens_per_s": [round(before, 1), round(after, 1)],
            "offered_factor": round(arrived * options.tokens / options.seconds / before, 2),
            "arrived": arrived,
            "goodput_tokens_per_s": round(goodput, 1),
            "refused": len(tally.refusal_s),
            "refusal_ms": refusal,
            "let_in_at_retry": {str(attempt): count for attempt, count in sorted(tally.let_in_at_attempt.items())},
            "never_let_in": tally.never_let_in,
            "undecided": tally.undecided,
            "told_s": quantiles([told_s for told_s, _ in tally.told_and_let_in]),
            "retry_after_error": quantiles(errors),
            "retry_after_error_below_the_most": quantiles(
                [
                    abs(let_in_s - told_s) / told_s
                    for told_s, let_in_s in tally.told_and_let_in
                    if told_s < RETRY_AFTER_MAX_S
                ]
            ),
            "rss_mib": dict(zip(("start", "middle", "end"), memory, strict=True)),
            "client_late_ms": quantiles(tally.late_s, 1e3),
            "faults": tally.faults,
            "laws": {
                "goodput": law(goodput / maximum, at_least=0.95),
                "refusal_ms": law(refusal.get("max"), at_most=50.0),
                "retry_after": law(statistics.median(errors) if errors else None, at_most=0.5),
                "memory": law(growth, at_most=0.05),
                "faults": law(tally.fault_count, at_most=0),
            },
        }


async def run(folder: Path, options: Options) -> dict[str, Any]:
    mesh = Mesh(folder)
    try:
        for _ in range(options.nodes):
            mesh.add("--slots", str(options.slots), "--queue", str(options.queue))
        for number in range(options.entries):
            mesh.add("--no-model", name=f"entry-{number + 1}")
        mesh.wait_until_agreed()
        with contextlib.suppress(PermissionError):  # after the nodes were started, who would inherit it
            os.nice(NICENESS)
        return await _Overload(mesh.nodes, options).run()
    finally:
        mesh.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--entries", type=int, default=0, help="more nodes, without a model")
    parser.add_argument("--slots", type=int, default=4, help="of each node")
    parser.add_argument("--queue", type=int, default=8, help="of each node")
    parser.add_argument("--tokens", type=int, default=512, help="of each answer")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--maximum-s", type=float, default=15.0, help="for each of the two measurements of the maximum")
    parser.add_argument("--factor", type=float, default=4.0, help="offered, of the maximum")
    parser.add_argument("--seed", type=int, default=7)
    options = Options(**vars(parser.parse_args()))
    progress(f"seed {options.seed}")
    garbage.settle()  # this client's own pauses would look like the mesh's
    with tempfile.TemporaryDirectory() as folder:
        figures = trio.run(run, Path(folder), options)
    finish(figures)


if __name__ == "__main__":
    main()
