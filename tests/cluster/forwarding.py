"""`python -m tests.cluster.forwarding`: what it costs that another node serves. One JSON line of figures.

Two nodes: `server` has the built-in model, `entry` has none and forwards everything to it. Exit status 1 where one of
these does not hold:

  added_ttft_p50_ms, added_ttft_p99_ms   pairs of requests one after the other, one to each node in random order: time
            to the first text at the entry less that at the server; at most 2 and 8 ms
  cpu       CPU of the entry process per forwarded token, of the CPU per token of a node that serves the same streams
            itself, its engine left out: at most 1.3. Both without what the process takes when idle. Of the server only
            the main thread counts, which is trio's: HTTP, templates, tokenizer; the engine, and what wakes trio with
            its events, have threads of their own. Rounds are interleaved, medians compared.
  complete  500 streams at once through the entry: all of them whole, and equal to what one alone gets
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from nodes import garbage
from tests.cluster.figures import cpu_s, finish, law, main_thread_cpu_s, progress, quantile, quantiles, rss_mib
from tests.cluster.mesh import Mesh, NodeProcess
from tests.cluster.stream_client import Answer, ask

IDLE_S = 5.0
WARM_UP_PAIRS = 5
TTFT_TOKENS = 4
CROWD_TOKENS = 64
CROWD_SILENCE_S = 300.0


@dataclass(frozen=True, slots=True)
class Options:
    pairs: int
    rounds: int
    concurrency: int
    tokens: int
    crowd: int
    seed: int


class _Forwarding:
    def __init__(self, server: NodeProcess, entry: NodeProcess, options: Options) -> None:
        self._server = server
        self._entry = entry
        self._options = options
        self._rng = random.Random(options.seed)

    async def run(self) -> dict[str, Any]:
        direct, forwarded = await self._first_tokens()
        added = [b - a for a, b in zip(direct, forwarded, strict=True)]
        progress("CPU")
        cpu = {str(n): await self._cpu(n) for n in sorted({1, self._options.concurrency})}
        progress(f"{self._options.crowd} streams at once")
        crowd = await self._crowd()
        p50, p99 = quantile(added, 0.5), quantile(added, 0.99)
        return {
            "seed": self._options.seed,
            "ttft_direct_ms": quantiles(direct, 1e3),
            "ttft_forwarded_ms": quantiles(forwarded, 1e3),
            "ttft_added_ms": quantiles(added, 1e3),
            "cpu_us_per_token_by_streams": cpu,
            "crowd": crowd,
            "laws": {
                "added_ttft_p50_ms": law(None if p50 is None else p50 * 1e3, at_most=2.0),
                "added_ttft_p99_ms": law(None if p99 is None else p99 * 1e3, at_most=8.0),
                "cpu": law(max(figures["ratio"] for figures in cpu.values()), at_most=1.3),
                "complete": law(crowd["right"], at_least=self._options.crowd),
            },
        }

    async def _first_tokens(self) -> tuple[list[float], list[float]]:
        direct: list[float] = []
        forwarded: list[float] = []
        for number in range(WARM_UP_PAIRS + self._options.pairs):
            pair = [(self._server, direct), (self._entry, forwarded)]
            self._rng.shuffle(pair)
            for node, times in pair:
                answer = await _stream(node, TTFT_TOKENS)
                assert answer.first_text_s is not None
                if number >= WARM_UP_PAIRS:
                    times.append(answer.first_text_s)
        return direct, forwarded

    async def _cpu(self, concurrency: int) -> dict[str, float]:
        """Microseconds a token, at so many streams at once."""
        idle_entry = await _per_s(lambda: cpu_s(self._entry))
        idle_server = await _per_s(lambda: main_thread_cpu_s(self._server))
        forwarded: list[float] = []
        local: list[float] = []
        for _ in range(self._options.rounds):
            streams = lambda node: self._at_once(node, concurrency)  # noqa: E731
            forwarded.append(await _per_token(self._entry, streams, cpu_s, idle_entry))
            local.append(await _per_token(self._server, streams, main_thread_cpu_s, idle_server))
            progress(f"{concurrency} streams: forwarded {forwarded[-1]:.0f}, local {local[-1]:.0f} us a token")
        figures = {"entry": statistics.median(forwarded), "local": statistics.median(local)}
        figures["ratio"] = figures["entry"] / figures["local"]
        return {name: round(value, 2) for name, value in figures.items()}

    async def _at_once(self, node: NodeProcess, count: int) -> int:
        """Tokens of so many streams."""
        tokens = 0

        async def one() -> None:
            nonlocal tokens
            answer = await _stream(node, self._options.tokens)
            assert answer.usage is not None
            tokens += answer.usage["completion_tokens"]

        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(one)
        return tokens

    async def _crowd(self) -> dict[str, Any]:
        right = (await _stream(self._server, CROWD_TOKENS)).choices[0].text
        answers: list[Answer] = []

        async def one() -> None:
            answers.append(await ask(self._entry.http, _body(CROWD_TOKENS), silence_s=CROWD_SILENCE_S))

        started = time.monotonic()
        async with trio.open_nursery() as nursery:
            for _ in range(self._options.crowd):
                nursery.start_soon(one)
        is_right = [a.ending == "done" and a.choices[0].text == right for a in answers]
        wrong = [a for a, ok in zip(answers, is_right, strict=True) if not ok]
        for answer in wrong:
            text = answer.choices[0].text if answer.choices else ""
            progress(f"WRONG {answer.ending} {answer.status} {answer.error} {text!r}")
        return {
            "streams": len(answers),
            "right": sum(is_right),
            "wrong": dict(Counter(f"{answer.ending} {answer.status}" for answer in wrong)),
            "seconds": round(time.monotonic() - started, 1),
            "first_text_s": quantiles([a.first_text_s for a in answers if a.first_text_s is not None]),
            "keep_alives": sum(answer.keep_alives for answer in answers),
            "entry_rss_mib": rss_mib([self._entry])["entry"],
        }


async def _per_s(used: Callable[[], float]) -> float:
    before = used()
    await trio.sleep(IDLE_S)
    return (used() - before) / IDLE_S


async def _per_token(
    node: NodeProcess,
    streams: Callable[[NodeProcess], Awaitable[int]],
    used: Callable[[NodeProcess], float],
    idle_per_s: float,
) -> float:
    started, before = time.monotonic(), used(node)
    tokens = await streams(node)
    return (used(node) - before - idle_per_s * (time.monotonic() - started)) / tokens * 1e6


async def _stream(node: NodeProcess, tokens: int) -> Answer:
    """Raises AssertionError where it is not whole: nothing disturbs these."""
    answer = await ask(node.http, _body(tokens))
    assert answer.ending == "done", f"{node.name}: {answer.error}"
    return answer


def _body(tokens: int) -> dict[str, Any]:
    return {
        "model": "demo",
        "messages": [{"role": "user", "content": "How do I add a node?"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": True,
    }


async def run(folder: Path, options: Options) -> dict[str, Any]:
    mesh = Mesh(folder)
    try:
        server = mesh.add(name="server")
        entry = mesh.add("--no-model", name="entry")
        mesh.wait_until_agreed()
        return await _Forwarding(server, entry, options).run()
    finally:
        mesh.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=300, help="of requests for the time to the first token")
    parser.add_argument("--rounds", type=int, default=7, help="of each measurement of CPU")
    parser.add_argument("--concurrency", type=int, default=8, help="streams at once when CPU is measured; and 1")
    parser.add_argument("--tokens", type=int, default=800, help="of each stream when CPU is measured")
    parser.add_argument("--crowd", type=int, default=500, help="streams at once through the entry")
    parser.add_argument("--seed", type=int, default=7, help="of the order within pairs")
    options = Options(**vars(parser.parse_args()))
    progress(f"seed {options.seed}")
    garbage.settle()  # this client's own pauses would look like the mesh's
    with tempfile.TemporaryDirectory() as folder:
        figures = trio.run(run, Path(folder), options)
    finish(figures)


if __name__ == "__main__":
    main()
