"""This project's engine as a contestant: everything goes through Engine.submit() and its streams.

The time inside ONNX Runtime is measured around its own call, and what lies between one call's end and the next one's
beginning counts as outside, whatever thread spends it: sampling, bookkeeping, waiting for locks.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import trio

from nodes import garbage
from nodes.engine.engine import Engine, load_engine
from nodes.engine.model_loader import read_model_folder
from nodes.engine.sampling import SamplingParams
from tests.benchmark.engine.worker import claim_stdout
from tests.benchmark.engine.workload import SHORT_PROMPT_TOKENS, Request, poisson_requests, prompt

DEADLINE_S = 3600.0
QUEUE_LIMIT = 4096
CAPACITY = 1024  # tokens a slot holds: the long prefix and its answer
LATENESS_PERIOD_S = 0.005
IDLE_PERIOD_S = 0.002


class RuntimeClock:
    """Beginning and end of every run of ONNX Runtime in this process, while is_on."""

    def __init__(self) -> None:
        self.is_on = False
        self.runs: list[tuple[float, float]] = []
        run = onnxruntime.InferenceSession.run_with_iobinding

        def timed(*arguments: Any) -> None:
            started = time.perf_counter()
            run(*arguments)
            if self.is_on:
                self.runs.append((started, time.perf_counter()))

        onnxruntime.InferenceSession.run_with_iobinding = timed

    def outside(self, since: int) -> tuple[float, float]:
        """Share of the time between the beginnings of run `since` and the last one, and seconds a run, spent outside.

        Of all runs where these are too few: a tiny model is done before the loop that counts has woken."""
        runs = self.runs[since:] if len(self.runs) - since > 2 else self.runs
        starts, ends = np.array(runs[:-1]).T
        next_starts = np.array(runs[1:])[:, 0]
        outside = next_starts - ends
        return float(outside.sum() / (next_starts - starts).sum()), float(np.median(outside))


class Contestant:
    """The engines of one folder, by their number of slots; made when they are first asked."""

    def __init__(self, folder: Path, threads: int, nursery: trio.Nursery, clock: RuntimeClock) -> None:
        self._folder = read_model_folder(folder)
        self._threads = threads
        self._nursery = nursery
        self._clock = clock
        self._engines: dict[int, Engine] = {}

    async def engine(self, slots: int) -> Engine:
        if slots not in self._engines:
            capacity = min(CAPACITY, self._folder.context_length)
            engine = load_engine(
                self._folder,
                slots=slots,
                queue_limit=QUEUE_LIMIT,
                capacity=capacity,
                threads=self._threads,
                provider="cpu",
            )
            await self._nursery.start(engine.run)
            self._engines[slots] = engine
        return self._engines[slots]

    async def prefill(self, tokens: int, seed: int, slots: int) -> dict[str, Any]:
        engine = await self.engine(slots)
        return {"tokens_per_s": tokens / await first_token_s(engine, prompt(seed, tokens))}

    async def decode(
        self, n: int, tokens: int, seed: int, slots: int, temperature: float = 0.0, top_p: float = 1.0
    ) -> dict[str, Any]:
        """From when every sequence has its first token until all together have n x tokens more, or one has ended.

        The others' prompts begin together, ours one after the other: shorter prompts let the sequences hold, in the
        mean, as many tokens as theirs when counting begins, since attention takes longer with each.
        """
        engine = await self.engine(slots)
        params = [SamplingParams(temperature, top_p, index, tokens + 2 * n, ignore_eos=True) for index in range(n)]
        batch = Batch(engine, seed, params, SHORT_PROMPT_TOKENS - (n - 1) // 2)
        self._clock.runs.clear()
        self._clock.is_on = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(batch.run)
            await batch.all_begun.wait()
            since = len(self._clock.runs)
            started, before = time.perf_counter(), batch.tokens
            await batch.wait_tokens(before + n * tokens)
            rate = (batch.tokens - before) / (time.perf_counter() - started)
            self._clock.is_on = False
            nursery.cancel_scope.cancel()
        while engine.statistics().active:  # its last step takes cores that the next contestant wants
            await trio.sleep(IDLE_PERIOD_S)
        share, outside_s = self._clock.outside(since)
        return {"tokens_per_s": rate, "outside_share": share, "outside_us": outside_s * 1e6}

    async def greedy(self, ids: list[int], tokens: int, slots: int) -> dict[str, Any]:
        engine = await self.engine(slots)
        return {"ids": await answer(engine, ids, tokens)}

    async def poisson(
        self, count: int, per_s: float, shortest: int, longest: int, seed: int, slots: int
    ) -> dict[str, Any]:
        """Every request is submitted when it arrives; those that find no slot wait in the engine's queue.

        estimate_error: median of |estimated - actual| / actual time to first token, of what the engine told at submit.
        """
        engine = await self.engine(slots)
        requests = poisson_requests(count, per_s, shortest, longest, seed)
        started = trio.current_time()

        async def one(request: Request) -> None:
            await trio.sleep_until(started + request.at_s)
            await answer(engine, request.prompt, request.tokens)

        async with trio.open_nursery() as nursery:
            for request in requests:
                nursery.start_soon(one, request)
        rate = sum(request.tokens for request in requests) / (trio.current_time() - started)
        return {"tokens_per_s": rate, "estimate_error": engine.statistics().first_token_error}

    async def streams(self, n: int, tokens: int, seed: int, slots: int) -> dict[str, Any]:
        """Time from asking for n answers at once to the end of the last."""
        engine = await self.engine(slots)
        started = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for index in range(n):
                nursery.start_soon(answer, engine, prompt(seed + index, SHORT_PROMPT_TOKENS), tokens)
        return {"seconds": time.perf_counter() - started}

    async def prefix(self, shared: int, seed: int, slots: int) -> dict[str, Any]:
        """Time to first token of a prompt never seen, and of the same prompt again."""
        engine = await self.engine(slots)
        ids = prompt(seed, shared)
        return {"cold_s": await first_token_s(engine, ids), "warm_s": await first_token_s(engine, ids)}

    async def lateness(self, n: int, tokens: int, seed: int, slots: int) -> dict[str, Any]:
        """How late the trio loop wakes a timer while n sequences decode."""
        engine = await self.engine(slots)
        late: list[float] = []

        async def observe() -> None:
            while True:
                due = trio.current_time() + LATENESS_PERIOD_S
                await trio.sleep_until(due)
                late.append(trio.current_time() - due)

        params = [SamplingParams(1.0, 0.95, index, tokens, ignore_eos=True) for index in range(n)]
        batch = Batch(engine, seed, params, SHORT_PROMPT_TOKENS)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(batch.run)
            await batch.all_begun.wait()
            nursery.start_soon(observe)
            await batch.wait_one_ended()
            nursery.cancel_scope.cancel()
        return {"p99_ms": float(np.quantile(late, 0.99)) * 1e3, "p50_ms": float(np.median(late)) * 1e3}


async def answer(engine: Engine, ids: list[int], tokens: int) -> list[int]:
    """Greedy ids of one answer of exactly so many tokens."""
    found: list[int] = []
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    async with engine.submit(ids, params, engine.now() + DEADLINE_S) as stream:
        async for event in stream:
            found += event.token_ids
    return found


async def first_token_s(engine: Engine, ids: list[int]) -> float:
    started = time.perf_counter()
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    async with engine.submit(ids, params, engine.now() + DEADLINE_S) as stream:
        await stream.receive()
    return time.perf_counter() - started


class Batch:
    """One sequence for each of params, submitted at once. tokens: received so far, without everyone's first."""

    def __init__(self, engine: Engine, seed: int, params: list[SamplingParams], prompt_tokens: int) -> None:
        self.all_begun = trio.Event()
        self.tokens = 0
        self._engine, self._seed, self._params, self._prompt_tokens = engine, seed, params, prompt_tokens
        self._begun = 0
        self._wanted = sys.maxsize
        self._is_done = trio.Event()

    async def run(self) -> None:
        """Until all have ended."""
        async with trio.open_nursery() as nursery:
            for index in range(len(self._params)):
                nursery.start_soon(self._generate, index)

    async def wait_tokens(self, wanted: int) -> None:
        """Until so many are received, or one has ended; once."""
        self._wanted = wanted
        await self._is_done.wait()

    async def wait_one_ended(self) -> None:
        await self._is_done.wait()

    async def _generate(self, index: int) -> None:
        engine, ids = self._engine, prompt(self._seed + index, self._prompt_tokens)
        async with engine.submit(ids, self._params[index], engine.now() + DEADLINE_S) as stream:
            await stream.receive()
            self._begun += 1
            if self._begun == len(self._params):
                self.all_begun.set()
            async for event in stream:
                self.tokens += len(event.token_ids)
                if self.tokens >= self._wanted:
                    self._is_done.set()
        self._is_done.set()


async def serve_engine(folder: Path, threads: int, reply: Callable[[dict[str, Any]], None]) -> None:
    """Answer commands from stdin until it ends."""
    clock = RuntimeClock()
    async with trio.open_nursery() as nursery:
        contestant = Contestant(folder, threads, nursery, clock)
        while line := await trio.to_thread.run_sync(sys.stdin.readline):
            command = json.loads(line)
            handler: Callable[..., Awaitable[dict[str, Any]]] = getattr(contestant, command.pop("do"))
            try:
                reply(await handler(**command))
            except Exception as exc:  # the controller reports it, whatever it is
                reply({"error": f"{type(exc).__name__}: {exc}"})
        nursery.cancel_scope.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    garbage.settle()  # as a node does
    trio.run(serve_engine, options.model, options.threads, claim_stdout())


if __name__ == "__main__":
    main()
