"""Whatever else an engine does at the same time, a request gets the tokens that transformers gives it in float32.

The folders of tests/models are made, and the answers recorded, by `python -m deploy.models.fixtures.make`. Each answer
is decisive by far more than float32 sums differ, so one wrong token is a mistake and no rounding.
"""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from nodes.engine.engine import Engine, load_engine
from nodes.engine.model_loader import read_model_folder
from nodes.engine.sampling import SamplingParams
from tests.unit.fake_session import greedy, read, running, until

MODELS = Path(__file__).parents[1] / "models"
EXACT = ["llama-fp32", "qwen2-fp32", "qwen3-fp32", "llama-optimum"]
QUANTISED = ["llama-int4", "qwen2-int4", "qwen3-int4"]
FAR = 1e12
SLOTS = 4


@dataclass(frozen=True, slots=True)
class Case:
    prompt: list[int]
    tokens: list[int]


def cases_of(model: str) -> list[Case]:
    """What transformers answers, of the model that this folder was made from."""
    file = MODELS / f"{model.partition('-')[0]}.greedy.json"
    return [Case(case["prompt"], case["tokens"]) for case in json.loads(file.read_text())]


def load(model: str, slots: int = SLOTS) -> Engine:
    folder = read_model_folder(MODELS / model)
    return load_engine(folder, slots=slots, queue_limit=99, threads=1, spinning=False, provider="cpu")


def exactly(case: Case) -> SamplingParams:
    return greedy(len(case.tokens), ignore_eos=True)


async def one_after_the_other(engine: Engine, cases: list[Case]) -> list[list[int]]:
    return [list((await read(engine.submit(case.prompt, exactly(case), FAR)))[1]) for case in cases]


async def staggered(engine: Engine, cases: list[Case], seed: int) -> list[list[int]]:
    """Each case once, when what came before has got some tokens, among others that are cancelled on their way."""
    rng = random.Random(seed)
    found: dict[int, list[int]] = {}
    order = list(range(len(cases)))
    rng.shuffle(order)

    async def stay(index: int) -> None:
        case = cases[index]
        found[index] = list((await read(engine.submit(case.prompt, exactly(case), FAR)))[1])

    async def leave(prompt: list[int], events: int) -> None:
        async with engine.submit(prompt, greedy(200), FAR) as stream:
            for _ in range(events):
                await stream.receive()

    async with trio.open_nursery() as nursery:
        for index in order:
            generated = engine.statistics().tokens_generated_total
            nursery.start_soon(stay, index)
            nursery.start_soon(leave, rng.choices(range(3, 512), k=rng.choice([2, 70])), rng.randrange(12))
            wanted = generated + rng.randrange(30)
            while engine.statistics().tokens_generated_total < wanted:
                await trio.sleep(0.001)
    return [found[index] for index in range(len(cases))]


@pytest.mark.parametrize("model", EXACT)
async def test_alone_or_among_others_a_float32_model_says_what_transformers_says(model: str) -> None:
    cases = cases_of(model)
    expected = [case.tokens for case in cases]
    assert len({tuple(tokens) for tokens in expected}) >= 6
    async with running(load(model)) as engine:
        assert await one_after_the_other(engine, cases) == expected
        for seed in range(2):
            assert await staggered(engine, cases, seed) == expected, f"seed {seed}"
        await until(engine, active=0, queued=0, free_slots=SLOTS)


@asynccontextmanager
async def accompanied(engine: Engine) -> AsyncIterator[None]:
    """Two others generate all the time; they begin again at different moments."""
    async with trio.open_nursery() as nursery:

        async def generate(length: int, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            while True:
                async with engine.submit([5], greedy(length, ignore_eos=True), FAR) as stream:
                    await stream.receive()
                    task_status.started()
                    task_status = trio.TASK_STATUS_IGNORED
                    async for _ in stream:
                        pass

        await nursery.start(generate, 397)
        await nursery.start(generate, 293)
        yield
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("model", QUANTISED)
async def test_among_many_a_quantised_model_says_what_it_says_among_few(model: str) -> None:
    """Never alone in a step: ONNX Runtime multiplies one row of activations by another kernel than several, which sums
    in another order. The last bit of an activation then decides now and then to which 8-bit step it is rounded."""
    cases = cases_of(model)
    async with running(load(model, slots=SLOTS + 2)) as engine, accompanied(engine):
        few = await one_after_the_other(engine, cases)
        assert len({tuple(tokens) for tokens in few}) == len(cases)
        for seed in range(2):
            assert await staggered(engine, cases, seed) == few, f"seed {seed}"


@pytest.mark.parametrize("model", EXACT + QUANTISED)
def test_the_folders_are_what_their_names_say(model: str) -> None:
    folder = read_model_folder(MODELS / model)
    assert str(folder.precision) == ("int4 block 32" if model in QUANTISED else "fp32")
    assert (folder.layers, folder.kv_heads, folder.head_size, folder.vocabulary_size) == (2, 2, 16, 512)
