"""Does an answer that moves to another node go on as it would have? Counts the answers that do not.

`python -m tests.benchmark.resume [--resumes 1000] [--size 200m] [--precision fp32 int4]` prints one JSON line for each
cell of a table: precision, greedy or seeded sampling at temperature 1, how the ids so far are taken up, `prefill` or
`replay`, and how a token is drawn, by the engine's own Gumbel-max or, to compare, by inverse CDF. One engine writes the
answers, another one gets a prompt with the answer's first k ids and continues; k is
random. Both run 16 sequences at once, so that no step has the same company as the one it is to repeat. An answer has
diverged when any later id differs.

Prompts are 32 to 200 random ids, answers 64 tokens. An answer is cut `--cuts` times, in passes over all of them: by the
next pass the second engine has forgotten what its prefix cache held of it.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import trio

from nodes.engine import sampler
from nodes.engine.engine import Engine, load_engine
from nodes.engine.engine_statistics import FAILED
from nodes.engine.errors import EngineFault
from nodes.engine.model_loader import read_model_folder
from nodes.engine.noise import DrawsNoise
from nodes.engine.nucleus import FloatArray
from nodes.engine.sampling import SamplingParams
from nodes.model_tools.random_llama import SIZES
from tests.benchmark.engine import models

Resume = Literal["prefill", "replay"]
Sampling = Literal["greedy", "seeded"]
RESUMES: tuple[Resume, ...] = ("prefill", "replay")
SAMPLINGS: tuple[Sampling, ...] = ("greedy", "seeded")

TOGETHER = 16
CAPACITY = 320
PROMPT_TOKENS = (32, 200)
ANSWER_TOKENS = 64
DEADLINE_S = 3600.0
FIRST_ID, LAST_ID = 10, 249
EXACT_BLOCK_SIZE = 32  # of int4: the block size whose steps do not depend on the batch


@dataclass(frozen=True, slots=True)
class Answer:
    """One complete answer, as it came from the first engine."""

    prompt: list[int]
    params: SamplingParams
    ids: tuple[int, ...]


def params_of(sampling: Sampling, index: int) -> SamplingParams:
    if sampling == "greedy":
        return SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS, ignore_eos=True)
    return SamplingParams(temperature=1.0, seed=index, is_seeded=True, max_tokens=ANSWER_TOKENS, ignore_eos=True)


def inverse_cdf(
    rows: Sequence[FloatArray], likeliest: Sequence[int], params: Sequence[SamplingParams], noise: DrawsNoise
) -> list[int]:
    """What most engines draw with: the first token at which the summed probabilities reach a random number."""
    found = []
    for index, (row, best, each) in enumerate(zip(rows, likeliest, params, strict=True)):
        sums = np.exp((row.astype(np.float64) - row[best]) / each.temperature).cumsum()
        found.append(int(sums.searchsorted(noise.one(index).key / 2.0**64 * sums[-1], side="right")))
    return found


async def read(engine: Engine, answer: Answer, ids_so_far: Sequence[int], resume: Resume | None) -> tuple[int, ...]:
    """The ids that follow ids_so_far."""
    options: dict[str, Any] = {} if resume is None else {"generated_ids": list(ids_so_far), "resume": resume}
    while True:
        found: list[int] = []
        try:
            async with engine.submit(answer.prompt, answer.params, engine.now() + DEADLINE_S, **options) as stream:
                async for event in stream:
                    found += event.token_ids
            return tuple(found)
        except (
            EngineFault
        ):  # a machine that stands still for seconds: the engine has given the requests up, and recovers
            if engine.statistics().state is FAILED:
                raise
            await trio.sleep(0.5)


async def together(count: int, do: Callable[[int], Awaitable[None]]) -> None:
    """do(0) to do(count - 1), TOGETHER of them at once."""
    indices = iter(range(count))

    async def worker() -> None:
        for index in indices:
            await do(index)

    async with trio.open_nursery() as nursery:
        for _ in range(TOGETHER):
            nursery.start_soon(worker)


async def answers_of(engine: Engine, count: int, sampling: Sampling, rng: random.Random) -> list[Answer]:
    """Complete answers to `count` random prompts."""
    answers = []
    for index in range(count):
        prompt = [rng.randint(FIRST_ID, LAST_ID) for _ in range(rng.randint(*PROMPT_TOKENS))]
        answers.append(Answer(prompt, params_of(sampling, index), ()))

    async def complete(index: int) -> None:
        answers[index] = replace(answers[index], ids=await read(engine, answers[index], (), None))

    await together(count, complete)
    return answers


async def diverged(
    engine: Engine, answers: list[Answer], cuts: int, resume: Resume, rng: random.Random
) -> tuple[int, int]:
    """Resumed answers that went another way, and ids that were compared."""
    wrong = compared = 0

    async def continue_one(index: int) -> None:
        nonlocal wrong, compared
        answer = answers[order[index]]
        cut = rng.randint(1, ANSWER_TOKENS - 1)
        found = await read(engine, answer, answer.ids[:cut], resume)
        wrong += found != answer.ids[cut:]
        compared += ANSWER_TOKENS - cut

    for _ in range(cuts):
        order = rng.sample(range(len(answers)), len(answers))
        await together(len(answers), continue_one)
    return wrong, compared


async def measure(folder: Path, facts: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the rows of one folder, each as it is complete. facts: what every row begins with."""
    model = read_model_folder(folder)
    first, second = (
        load_engine(
            model,
            slots=TOGETHER,
            queue_limit=TOGETHER,
            capacity=min(CAPACITY, model.context_length),
            threads=options.threads,
            provider="cpu",
        )
        for _ in range(2)
    )
    rng = random.Random(options.seed)
    async with trio.open_nursery() as nursery:
        await nursery.start(first.run)
        await nursery.start(second.run)
        for sampling in options.sampling:
            answers = await answers_of(first, -(-options.resumes // options.cuts), sampling, rng)
            for resume in options.resume:
                started = time.monotonic()
                wrong, compared = await diverged(second, answers, options.cuts, resume, rng)
                row = {**facts, "sampling": sampling, "resume": resume, "resumes": len(answers) * options.cuts}
                row |= {"diverged": wrong, "ids_compared": compared, "seconds": round(time.monotonic() - started)}
                print(json.dumps(row), flush=True)
        nursery.cancel_scope.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="200m")
    parser.add_argument("--precision", nargs="+", choices=models.PRECISIONS, default=models.PRECISIONS)
    parser.add_argument("--block-size", type=int, choices=(32, 128), default=EXACT_BLOCK_SIZE, help="of int4")
    parser.add_argument("--sampling", nargs="+", choices=SAMPLINGS, default=SAMPLINGS)
    parser.add_argument("--resume", nargs="+", choices=RESUMES, default=RESUMES)
    parser.add_argument("--draw", choices=("gumbel-max", "inverse-cdf"), default="gumbel-max")
    parser.add_argument("--resumes", type=int, default=1000, help="of each cell")
    parser.add_argument("--cuts", type=int, default=4, help="of each answer")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--work", type=Path, help="where models are made and found again; default: a temporary folder")
    options = parser.parse_args()
    if options.draw == "inverse-cdf":
        sampler.draw = inverse_cdf  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as temporary:
        for precision in options.precision:
            folder = models.graph_folder(options.work or Path(temporary), options.size, precision, options.block_size)
            facts: dict[str, Any] = {"model": options.size, "precision": precision, "draw": options.draw}
            if precision == "int4":
                facts["block_size"] = options.block_size
            trio.run(measure, folder, facts, options)


if __name__ == "__main__":
    main()
