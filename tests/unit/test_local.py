"""The Generator over the engine: what goes in, what comes out, and what its observer is told."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio

from mesh.errors import ModelUnknown, NoCapacity
from nodes.engine.chat_template import ChatTemplate
from nodes.engine.engine import Engine
from nodes.engine.model_loader import LoadedModel
from nodes.engine.sampling import SamplingParams
from nodes.engine.tokenizer import ENCODE_INLINE_BYTES_MAX
from nodes.generation import (
    DeadlineExceeded,
    GenerateEvent,
    GenerateRequest,
    GenerationFailed,
    Grammar,
    RequestInvalid,
    Sampling,
    Usage,
)
from nodes.local import LocalGenerator, LocalStream, Status
from nodes.model_tools.random_llama import IM_END
from observability.tracing import NO_TRACING, Tracer
from tests.unit.fake_session import CAPACITY, Clock, FakeSession, drain, running, toy_model, until

GREEDY = Sampling(temperature=0.0, max_tokens=8)


class Witness:
    """Remembers what an observer is told, without the seconds."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []
        self.later_tokens = 0
        self.labels: Mapping[str, str] = {}

    def started(self, model: str) -> None:
        self.told.append(("started", model))

    def first_token(self, model: str, seconds: float, queued_s: float | None, labels: Mapping[str, str]) -> None:
        assert seconds >= 0
        assert queued_s is None or queued_s >= 0
        self.labels = labels
        self.told.append(("first_token", model))

    def next_tokens(self, model: str, seconds: float, count: int) -> None:
        assert seconds >= 0
        self.later_tokens += count

    def finished(
        self,
        model: str,
        status: Status,
        seconds: float,
        prompt_tokens: int,
        completion_tokens: int,
        labels: Mapping[str, str],
        finish_reason: str | None,
    ) -> None:
        assert seconds >= 0
        assert (finish_reason is not None) == (status == "success")
        self.told.append(("finished", model, status, prompt_tokens, completion_tokens))


class Setup:
    """One generator over one fake engine of one slot."""

    def __init__(self, queue_limit: int = 2, model: LoadedModel | None = None, tracer: Tracer = NO_TRACING) -> None:
        self.clock = Clock()
        self.session = FakeSession(slots=1)
        self.engine = Engine(model or toy_model(), self.session, queue_limit=queue_limit, now=self.clock)
        self.witness = Witness()
        self.local = LocalGenerator({"demo": self.engine}, observer=self.witness, tracer=tracer)

    async def open(
        self,
        content: str = "hello",
        sampling: Sampling = GREEDY,
        deadline_s: float = 600.0,
        model: str = "demo",
        **fields: Any,
    ) -> LocalStream:
        messages = ({"role": "user", "content": content},)
        return await self.local.open(GenerateRequest("r", model, messages, sampling, deadline_s, **fields))


@asynccontextmanager
async def serving(setup: Setup) -> AsyncIterator[Setup]:
    async with running(setup.engine):
        yield setup


async def read(stream: LocalStream) -> tuple[str, tuple[int, ...], GenerateEvent]:
    async with stream:
        events = [event async for event in stream]
    assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
    assert all(event.usage is None for event in events[:-1])
    return "".join(e.text for e in events), tuple(i for e in events for i in e.token_ids), events[-1]


def prompt_tokens(content: str) -> int:
    model = toy_model()
    return len(model.tokenizer.encode(model.chat_template.render([{"role": "user", "content": content}])))


async def test_an_answer_carries_text_ids_and_usage() -> None:
    async with serving(Setup()) as setup:
        text, ids, last = await read(await setup.open())
        assert setup.witness.labels == {"request_id": "r"}
        assert text == toy_model().tokenizer.decode(list(ids)).rstrip("\N{REPLACEMENT CHARACTER}")
        assert last.finish_reason == "length"
        assert last.usage == Usage(prompt_tokens("hello"), 8)
        assert setup.witness.told == [
            ("started", "demo"),
            ("first_token", "demo"),
            ("finished", "demo", "success", prompt_tokens("hello"), 8),
        ]


async def test_the_end_of_sequence_token_is_not_counted() -> None:
    model = toy_model()
    async with serving(Setup()) as setup:
        _, ids, _ = await read(await setup.open())
    ends_there = LoadedModel("f", frozenset({ids[5], IM_END}), model.tokenizer, model.chat_template)
    cut = ids.index(ids[5])
    async with serving(Setup(model=ends_there)) as setup:
        _, shorter, last = await read(await setup.open())
        assert shorter == ids[:cut]
        assert (last.finish_reason, last.usage) == ("stop", Usage(prompt_tokens("hello"), cut))
        ignoring = Sampling(temperature=0.0, max_tokens=8, ignore_eos=True)
        assert (await read(await setup.open(sampling=ignoring)))[1] == ids


async def test_a_seed_repeats_an_answer_and_without_one_the_entrys_noise_decides() -> None:
    async with serving(Setup()) as setup:
        seeded = Sampling(temperature=1.5, seed=-7, max_tokens=20)
        free = Sampling(temperature=1.5, max_tokens=20)
        texts = [
            (await read(await setup.open(sampling=sampling, noise_seed=noise_seed)))[0]
            for sampling, noise_seed in ((seeded, 1), (seeded, 2), (free, 1), (free, 2), (free, 2))
        ]
    assert texts[0] == texts[1]
    assert texts[3] == texts[4]
    assert len(set(texts)) == 3


@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(temperature=1.5, seed=3, max_tokens=8)], ids=["greedy", "seeded"]
)
async def test_an_answer_goes_on_after_the_ids_it_is_given_and_counts_only_what_is_new(sampling: Sampling) -> None:
    async with serving(Setup()) as setup:
        text, ids, whole = await read(await setup.open(sampling=sampling))
        for count in (1, 5, 8):
            before = len(setup.witness.told)
            resumed = await setup.open(
                sampling=sampling, generated_ids=ids[:count], fingerprint=setup.engine.fingerprint
            )
            rest, rest_ids, last = await read(resumed)
            assert rest_ids == ids[count:]
            assert text.endswith(rest)
            assert (last.finish_reason, last.usage and last.usage.completion_tokens) == (whole.finish_reason, 8)
            assert setup.witness.told[before:][-1] == ("finished", "demo", "success", 0, 8 - count)


async def test_an_answer_of_another_model_is_not_gone_on_with() -> None:
    async with serving(Setup()) as setup:
        with pytest.raises(GenerationFailed, match="differs"):
            await setup.open(generated_ids=(1,), fingerprint="another")


async def test_logprobs_and_grammars_reach_the_engine_and_come_back() -> None:
    async with serving(Setup()) as setup:
        async with await setup.open(sampling=Sampling(temperature=0.0, max_tokens=3, logprobs=2)) as stream:
            events = [event async for event in stream]
        rows = [row for event in events for row in event.logprobs]
        assert [len(row.top) for row in rows] == [2, 2, 2]
        assert rows[0].top[0] == (rows[0].token, rows[0].logprob)
        with pytest.raises(RequestInvalid, match="not known"):
            await setup.open(sampling=Sampling(grammar=Grammar("prose")))
        with pytest.raises(RequestInvalid):
            await setup.open(sampling=Sampling(grammar=Grammar("regex", "(")))


async def test_a_bias_for_a_token_that_the_model_does_not_have_is_refused_where_an_answer_begins() -> None:
    async with serving(Setup()) as setup:
        biased = replace(GREEDY, logit_bias=((3, 1.0), (512, 1.0)))
        with pytest.raises(RequestInvalid, match="logit_bias: token 512 is not among the 512 of this model") as raised:
            await setup.open(sampling=biased)
        assert raised.value.param == "logit_bias"
        assert setup.witness.told == []
        await read(await setup.open(sampling=biased, generated_ids=(1,)))
        await read(await setup.open(sampling=replace(GREEDY, logit_bias=((511, 1.0),))))


async def test_max_tokens_is_cut_to_what_is_left_of_the_context() -> None:
    content = "x" * (CAPACITY - prompt_tokens("") - 3)
    room = CAPACITY - prompt_tokens(content)
    assert 0 < room < 50
    async with serving(Setup()) as setup:
        for max_tokens in (None, 10_000):
            _, ids, last = await read(await setup.open(content, Sampling(temperature=0.0, max_tokens=max_tokens)))
            assert (len(ids), last.finish_reason) == (room, "length")


@pytest.mark.parametrize("size", [CAPACITY * 8, ENCODE_INLINE_BYTES_MAX * 4], ids=["inline", "in a worker thread"])
async def test_a_prompt_beyond_the_context_is_the_clients_fault(size: int) -> None:
    async with serving(Setup()) as setup:
        with pytest.raises(RequestInvalid, match=f"maximum context length is {CAPACITY} tokens") as raised:
            await setup.open("0" * size)
        assert (raised.value.param, raised.value.code) == ("messages", "context_length_exceeded")
        assert setup.witness.told == []


async def test_messages_that_the_template_refuses_are_the_clients_fault() -> None:
    model = toy_model()
    template = ChatTemplate("{{ raise_exception('no such role') }}", bos_token="", eos_token="")
    setup = Setup(model=LoadedModel("f", model.eos_ids, model.tokenizer, template))
    async with serving(setup):
        with pytest.raises(RequestInvalid, match="no such role"):
            await setup.open()
    template = ChatTemplate("", bos_token="", eos_token="")
    setup = Setup(model=LoadedModel("f", model.eos_ids, model.tokenizer, template))
    async with serving(setup):
        with pytest.raises(RequestInvalid, match="empty prompt"):
            await setup.open()
    assert setup.witness.told == []


async def test_a_prompt_as_text_or_ids_is_taken_as_it_is() -> None:
    ids = toy_model().tokenizer.encode("Once upon a time")
    async with serving(Setup()) as setup:
        asked = [GenerateRequest("r", "demo", (), GREEDY, prompt=prompt) for prompt in ("Once upon a time", tuple(ids))]
        (text, answer, last), (same_text, same_answer, _) = [await read(await setup.local.open(r)) for r in asked]
        assert (text, answer) == (same_text, same_answer)
        assert last.usage == Usage(len(ids), 8)


@pytest.mark.parametrize("prompt", ["", (), (CAPACITY * 100,), (-1,), (5,) * CAPACITY, "0" * 10_000])
async def test_a_prompt_that_the_model_cannot_take_is_the_clients_fault(prompt: str | tuple[int, ...]) -> None:
    async with serving(Setup()) as setup:
        with pytest.raises(RequestInvalid) as raised:
            await setup.local.open(GenerateRequest("r", "demo", (), GREEDY, prompt=prompt))
        assert raised.value.param == "prompt"


async def test_tools_reach_the_template() -> None:
    model = toy_model()
    template = ChatTemplate(
        "{{ tools[0].function.name }}{{ messages[0].tool_calls[0].function.arguments.city }}",
        bos_token="",
        eos_token="",
    )
    setup = Setup(model=LoadedModel("f", model.eos_ids, model.tokenizer, template))
    tools = json.dumps([{"type": "function", "function": {"name": "weather"}}])
    calls = json.dumps([{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Ulm"}'}}])
    message = {"role": "assistant", "content": "", "tool_calls": calls}
    async with serving(setup):
        _, _, last = await read(await setup.local.open(GenerateRequest("r", "demo", (message,), GREEDY, tools=tools)))
        assert last.usage == Usage(len(model.tokenizer.encode("weatherUlm")), 8)
        with pytest.raises(RequestInvalid, match="no JSON"):
            await setup.local.open(GenerateRequest("r", "demo", (message,), GREEDY, tools="["))


async def test_an_unknown_model_is_said_to_be_unknown() -> None:
    async with serving(Setup()) as setup:
        with pytest.raises(ModelUnknown, match="'absent'"):
            await setup.open(model="absent")
        assert setup.witness.told == []


async def test_a_full_queue_is_no_capacity_and_counts_as_rejected() -> None:
    async with serving(Setup(queue_limit=0)) as setup:
        setup.session.hold()
        stream = await setup.open()
        with pytest.raises(NoCapacity) as raised:
            await setup.open()
        assert raised.value.retry_after_s >= 1.0
        assert setup.witness.told[1:] == [("started", "demo"), ("finished", "demo", "rejected", 0, 0)]
        await stream.aclose()


async def test_who_gave_its_place_in_the_queue_to_another_asker_is_no_capacity_and_counts_as_rejected() -> None:
    async with serving(Setup(queue_limit=2)) as setup:
        setup.session.hold()
        streams = [await setup.open() for _ in range(3)]
        other = setup.engine.submit([5], SamplingParams(max_tokens=2), 1e9, fairness_id="other")
        with pytest.raises(NoCapacity) as raised:
            await streams[-1].receive()
        assert raised.value.retry_after_s >= 1.0
        await streams.pop().aclose()
        assert setup.witness.told[-1] == ("finished", "demo", "rejected", 0, 0)
        for stream in (*streams, other):
            await stream.aclose()


async def test_an_engine_that_does_not_run_fails_the_request() -> None:
    setup = Setup()
    with pytest.raises(GenerationFailed):
        await setup.open()
    assert setup.witness.told == [("started", "demo"), ("finished", "demo", "error", 0, 0)]


async def test_a_request_past_its_deadline_is_an_error_of_its_own_kind() -> None:
    async with serving(Setup()) as setup:
        setup.session.hold()
        stream = await setup.open(deadline_s=3.0)
        setup.clock.now += 3.0
        setup.session.release()
        with pytest.raises(DeadlineExceeded):
            await drain(stream)
        await stream.aclose()
        assert setup.witness.told[-1][:3] == ("finished", "demo", "error")
        assert [entry[0] for entry in setup.witness.told].count("finished") == 1


async def test_an_engine_fault_is_a_failed_generation() -> None:
    async with serving(Setup()) as setup:
        setup.session.poison = IM_END  # the template writes it
        stream = await setup.open()
        with pytest.raises(GenerationFailed):
            await drain(stream)
        await stream.aclose()
        assert [entry[0] for entry in setup.witness.told].count("finished") == 1
        assert setup.witness.told[-1][:3] == ("finished", "demo", "error")


@pytest.mark.parametrize("reads", [0, 1], ids=["before the first token", "in the middle"])
async def test_a_reader_that_leaves_cancels_and_is_counted_once(reads: int) -> None:
    async with serving(Setup()) as setup:
        setup.session.hold()
        stream = await setup.open(sampling=Sampling(temperature=0.0, max_tokens=200))
        setup.session.allow(reads)
        for _ in range(reads):
            assert (await stream.receive()).token_ids
        await stream.aclose()
        await stream.aclose()
        setup.session.release()
        await until(setup.engine, active=0, free_slots=1)
        first = [("first_token", "demo")] * reads
        counts = (prompt_tokens("hello"), 1) if reads else (0, 0)
        assert setup.witness.told == [("started", "demo"), *first, ("finished", "demo", "cancelled", *counts)]
        with pytest.raises(trio.ClosedResourceError):
            await stream.receive()


async def test_a_generator_without_an_observer_generates() -> None:
    setup = Setup()
    setup.local = LocalGenerator({"demo": setup.engine})
    async with serving(setup):
        assert (await read(await setup.open()))[2].finish_reason == "length"


async def test_tokens_after_the_first_event_are_told_of_to_the_observer() -> None:
    setup = Setup()
    setup.session.hold()
    async with serving(setup), await setup.open() as stream:
        setup.session.allow(1)  # the prefill, which gives the first token
        first = await stream.receive()
        setup.session.release()
        later = [event async for event in stream]
    assert len(first.token_ids) == 1
    assert setup.witness.later_tokens == sum(len(event.token_ids) for event in later) > 0
