"""Tokens per second of one engine, through its streams: prefill alone, and decoding with 1, 4 and 8 sequences.

`python -m tests.benchmark.engine --model FOLDER [--threads 0] [--prompt 256] [--tokens 48]` prints one JSON line. Make
a folder with `python -m deploy.models.random_llama --out FOLDER --size 200m`. Decoding is timed from when every
sequence has its first token until the first of them ends; outside_share is the part of all steps spent outside ONNX
Runtime.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import trio

from nodes.engine.engine import Engine, load_engine
from nodes.engine.model_loader import read_model_folder
from nodes.engine.sampling import SamplingParams

BATCHES = (1, 4, 8)
SHORT_PROMPT = 16
DEADLINE_S = 600.0


@dataclass(frozen=True, slots=True)
class Load:
    """prompt: tokens of the prefill measurement. tokens: decoded per sequence. top_p: below 1 samples."""

    prompt: int
    tokens: int
    temperature: float
    top_p: float


async def prefill_rate(engine: Engine, load: Load, rng: random.Random) -> float:
    """Prompt tokens per second until the first token of an otherwise idle engine."""
    prompt = [rng.randrange(10, 250) for _ in range(load.prompt)]
    started = time.perf_counter()
    async with engine.submit(prompt, SamplingParams(max_tokens=1), engine.now() + DEADLINE_S) as stream:
        await stream.receive()
    return load.prompt / (time.perf_counter() - started)


async def decode_rate(engine: Engine, load: Load, count: int, rng: random.Random) -> float:
    """Tokens per second of `count` sequences together."""
    begun = 0
    tokens = 0
    all_begun, one_ended = trio.Event(), trio.Event()

    async def generate(seed: int) -> None:
        nonlocal begun, tokens
        prompt = [rng.randrange(10, 250) for _ in range(SHORT_PROMPT)]
        params = SamplingParams(load.temperature, load.top_p, seed, load.tokens + 2 * count, ignore_eos=True)
        async with engine.submit(prompt, params, engine.now() + DEADLINE_S) as stream:
            await stream.receive()
            begun += 1
            if begun == count:
                all_begun.set()
            async for event in stream:
                tokens += len(event.token_ids)
        one_ended.set()

    async with trio.open_nursery() as nursery:
        for seed in range(count):
            nursery.start_soon(generate, seed)
        await all_begun.wait()
        started, tokens = time.perf_counter(), 0
        await one_ended.wait()
        return tokens / (time.perf_counter() - started)


async def measure(engine: Engine, load: Load) -> dict[str, float]:
    rng = random.Random(1)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        await decode_rate(engine, load, max(BATCHES), rng)  # makes every binding
        before = engine.statistics()
        figures = {f"prefill_{load.prompt}": max([await prefill_rate(engine, load, rng) for _ in range(2)])}
        for count in BATCHES:
            figures[f"decode_{count}"] = await decode_rate(engine, load, count, rng)
        after = engine.statistics()
        nursery.cancel_scope.cancel()
    in_steps = after.step_seconds_total - before.step_seconds_total
    in_session = after.session_seconds_total - before.session_seconds_total
    outside_us = (in_steps - in_session) / (after.step_count - before.step_count) * 1e6
    return figures | {"outside_share": 1 - in_session / in_steps, "outside_us_per_step": outside_us}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--capacity", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    options = parser.parse_args()
    engine = load_engine(
        read_model_folder(options.model),
        slots=max(BATCHES),
        queue_limit=0,
        capacity=options.capacity,
        threads=options.threads,
        provider="cpu",
    )
    figures = trio.run(measure, engine, Load(options.prompt, options.tokens, options.temperature, options.top_p))
    print(json.dumps({name: round(value, 4 if "share" in name else 1) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
