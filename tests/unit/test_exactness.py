"""Whatever else an engine does at the same time, a request gets the tokens that transformers gives it in float32.

The folders of tests/models are made, and the answers recorded, by `python -m deploy.models.fixtures.make`. Each answer
is decisive by far more than float32 sums differ, so one wrong token is a mistake and no rounding.
"""

from __future__ import annotations

import json
import random
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

    async def leave(prompt: list[int], tokens: int) -> None:
        async with engine.submit(prompt, greedy(200), FAR) as stream:
            while tokens > 0:  # a late reader gets many in one event
                tokens -= len((await stream.receive()).token_ids)

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


@pytest.mark.parametrize("model", QUANTISED)
async def test_alone_or_among_others_a_quantised_model_says_the_same(model: str) -> None:
    cases = cases_of(model)
    async with running(load(model)) as engine:
        alone = await one_after_the_other(engine, cases)
        assert len({tuple(tokens) for tokens in alone}) == len(cases)
        for seed in range(2):
            assert await staggered(engine, cases, seed) == alone, f"seed {seed}"


@pytest.mark.parametrize("model", EXACT + QUANTISED)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_an_answer_cut_anywhere_goes_on_as_it_would_have(model: str, temperature: float) -> None:
    """Among others, on an engine that has cached other things than the one where the answer began."""
    rng = random.Random(5)
    cases = cases_of(model)[:4]
    params = SamplingParams(temperature=temperature, seed=9, is_seeded=True, max_tokens=40, ignore_eos=True)
    async with running(load(model)) as engine:
        whole = [(await read(engine.submit(case.prompt, params, FAR)))[1] for case in cases]
    found: dict[int, tuple[int, ...]] = {}

    async def resume(index: int, cut: int) -> None:
        stream = engine.submit(cases[index].prompt, params, FAR, generated_ids=whole[index][:cut])
        found[index] = whole[index][:cut] + (await read(stream))[1]

    async with running(load(model)) as engine:
        for _ in range(2):
            async with trio.open_nursery() as nursery:
                for index in range(len(cases)):
                    nursery.start_soon(resume, index, rng.randrange(1, 40))
            assert [found[index] for index in range(len(cases))] == whole


@pytest.mark.parametrize("model", EXACT + QUANTISED)
async def test_what_is_cached_changes_no_token(model: str) -> None:
    rng = random.Random(6)
    start = rng.choices(range(3, 512), k=140)
    prompts = [start + rng.choices(range(3, 512), k=rng.choice([1, 30, 90])) for _ in range(5)]
    params = greedy(20, ignore_eos=True)
    cold: list[list[int]] = []
    for prompt in prompts:
        async with running(load(model)) as engine:
            cold.append(list((await read(engine.submit(prompt, params, FAR)))[1]))
    async with running(load(model)) as engine:
        await read(engine.submit(prompts[0], params, FAR))
        for prompt, expected in zip(prompts, cold, strict=True):
            _, ids, last = await read(engine.submit(prompt, params, FAR))
            assert list(ids) == expected
            assert last.cached_tokens >= 128
            # The conversation goes on: what of the answer's rows may be reused, is.
            follow_up = [*prompt, *ids, *rng.choices(range(3, 512), k=9)]
            await read(engine.submit(follow_up, params, FAR))


@pytest.mark.parametrize("model", EXACT + QUANTISED)
def test_the_folders_are_what_their_names_say(model: str) -> None:
    folder = read_model_folder(MODELS / model)
    assert str(folder.precision) == ("int4 block 32" if model in QUANTISED else "fp32")
    assert (folder.layers, folder.kv_heads, folder.head_size, folder.vocabulary_size) == (2, 2, 16, 512)
