"""The engine: its thread, its streams, and what happens to requests that join, leave, are late or break."""

from __future__ import annotations

import itertools
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio

from nodes.engine import executor, step_watch
from nodes.engine import stream as stream_module
from nodes.engine.engine import Engine, Resume, load_engine
from nodes.engine.engine_statistics import FAILED, LOADING, READY, STUCK
from nodes.engine.errors import (
    DeadlinePassed,
    EngineFault,
    EngineOverflow,
    EngineStopped,
    PromptTooLong,
    QueueFull,
    TokenUnknown,
)
from nodes.engine.model_loader import ModelFolder, ModelFolderInvalid, read_model_folder
from nodes.engine.sampling import GrammarSpec, SamplingParams
from nodes.engine.stream import EngineStream
from nodes.model_tools.random_llama import write_random_llama
from tests.unit.fake_session import (
    CAPACITY,
    Clock,
    FakeSession,
    drain,
    greedy,
    read,
    running,
    toy_model,
    until,
    until_delivered,
    until_entered,
)

FAR = 1e12
QUEUE_LIMIT = 3
PROMPTS = [[10 + i, *range(20, 20 + length)] for i, length in enumerate([3, 70, 1, 130, 12, 64, 5, 200])]


def fake_engine(
    slots: int = 4, queue_limit: int = 99, clock: Clock | None = None, *, is_exact: bool = True
) -> tuple[Engine, FakeSession]:
    session = FakeSession(slots, is_exact=is_exact)
    return Engine(toy_model(), session, queue_limit=queue_limit, now=clock or Clock()), session


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return read_model_folder(write_random_llama(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(params=["fake", "onnx"])
def engine(request: pytest.FixtureRequest, folder: ModelFolder) -> Engine:
    if request.param == "fake":
        return fake_engine(slots=8)[0]
    return load_engine(folder, slots=8, queue_limit=99, threads=1, provider="cpu")


async def all_together(engine: Engine, params: list[SamplingParams]) -> list[tuple[str, tuple[int, ...]]]:
    """Text and ids of PROMPTS, generated at the same time."""
    found: dict[int, tuple[str, tuple[int, ...]]] = {}

    async def one(index: int) -> None:
        found[index] = (await read(engine.submit(PROMPTS[index], params[index], FAR)))[:2]

    async with trio.open_nursery() as nursery:
        for index in range(len(PROMPTS)):
            nursery.start_soon(one, index)
    return [found[index] for index in range(len(PROMPTS))]


@pytest.mark.parametrize("kind", ["greedy", "seeded"])
async def test_eight_concurrent_generations_give_exactly_what_each_gives_alone(engine: Engine, kind: str) -> None:
    params = [
        greedy(30 + i) if kind == "greedy" else SamplingParams(temperature=1.2, top_p=0.95, seed=i, max_tokens=30 + i)
        for i in range(len(PROMPTS))
    ]
    async with running(engine):
        alone = [
            (await read(engine.submit(prompt, options, FAR)))[:2]
            for prompt, options in zip(PROMPTS, params, strict=True)
        ]
        assert await all_together(engine, params) == alone
    assert [len(ids) for _, ids in alone] == [30 + i for i in range(len(PROMPTS))]
    assert len({text for text, _ in alone}) == len(PROMPTS)


async def test_eight_generations_are_decoded_in_one_batch() -> None:
    engine, session = fake_engine(slots=8)
    async with running(engine):
        await all_together(engine, [greedy(40)] * 8)
    assert max(session.batches) == 8


async def test_a_request_that_comes_later_is_not_kept_waiting_by_one_that_runs() -> None:
    engine, session = fake_engine()
    session.hold()
    async with running(engine):
        long = engine.submit(PROMPTS[0], greedy(200), FAR)
        session.allow()
        await long.receive()
        short = engine.submit(PROMPTS[2], greedy(2), FAR)
        session.allow(4)  # a decode step under way, then a tick of both, then one decode step of both
        _, ids, last = await read(short)
        assert (len(ids), last.finish_reason) == (2, "length")
        assert engine.statistics().active >= 1
        await long.aclose()


async def test_a_stream_carries_text_ids_counts_and_the_reason_it_ended() -> None:
    engine, _ = fake_engine()
    async with running(engine):
        text, ids, last = await read(engine.submit(PROMPTS[0], greedy(12), FAR))
        assert text == toy_model().tokenizer.decode(list(ids)).rstrip("\N{REPLACEMENT CHARACTER}")
        assert (last.finish_reason, last.prompt_tokens, last.completion_tokens) == ("length", len(PROMPTS[0]), 12)
        word = next(word for word in text.split() if len(word) > 1)
        cut, _, stopped = await read(engine.submit(PROMPTS[0], greedy(12, stop=(word,)), FAR))
        assert cut == text[: text.index(word)]
        assert stopped.finish_reason == "stop"
        assert stopped.completion_tokens < 12


async def test_an_answer_ends_where_the_capacity_does() -> None:
    engine, _ = fake_engine()
    async with running(engine):
        _, ids, last = await read(engine.submit([5] * (CAPACITY - 3), greedy(None), FAR))
        assert (len(ids), last.finish_reason) == (3, "length")
        with pytest.raises(PromptTooLong, match=f"maximum context length is {CAPACITY} tokens.* has {CAPACITY} tokens"):
            engine.submit([5] * CAPACITY, greedy(), FAR)


async def test_a_late_reader_gets_all_that_waits_at_once() -> None:
    engine, _ = fake_engine()
    async with running(engine):
        stream = engine.submit(PROMPTS[0], greedy(20), FAR)
        await until_delivered(engine)
        event = await stream.receive()
        assert (len(event.token_ids), event.finish_reason) == (20, "length")
        with pytest.raises(trio.EndOfChannel):
            await stream.receive()


@pytest.mark.parametrize("progress", ["waiting", "in prefill", "decoding"])
async def test_closing_a_stream_frees_its_slot_within_one_step(progress: str) -> None:
    engine, session = fake_engine(slots=1)
    session.hold()
    async with running(engine):
        blocker = engine.submit(PROMPTS[0], greedy(200), FAR) if progress == "waiting" else None
        stream = engine.submit(PROMPTS[3], greedy(200), FAR)
        after = engine.submit(PROMPTS[2], greedy(1), FAR)
        if progress == "decoding":
            session.allow(3)
            await stream.receive()
        await stream.aclose()
        await stream.aclose()
        if blocker is not None:
            assert engine.statistics().queued == 1
            await blocker.aclose()
        session.allow(2)  # the step under way, and the next one, which is the other's
        assert len((await read(after))[1]) == 1
        with pytest.raises(trio.ClosedResourceError):
            await stream.receive()


async def test_cancelling_some_leaves_the_text_of_the_others_as_it_is() -> None:
    engine, _ = fake_engine(slots=8)
    async with running(engine):
        params = [greedy(60)] * 8
        alone = [(await read(engine.submit(prompt, greedy(60), FAR)))[:2] for prompt in PROMPTS]

        async def leave_early(index: int) -> None:
            stream = engine.submit(PROMPTS[index], params[index], FAR)
            tokens = 0  # of events there are fewer where this loop is late: one holds all that came meanwhile
            while tokens < index:
                tokens += len((await stream.receive()).token_ids)
            await stream.aclose()

        found: dict[int, tuple[str, tuple[int, ...]]] = {}

        async def stay(index: int) -> None:
            found[index] = (await read(engine.submit(PROMPTS[index], params[index], FAR)))[:2]

        async with trio.open_nursery() as nursery:
            for index in range(8):
                nursery.start_soon(leave_early if index % 2 else stay, index)
        assert all(found[index] == alone[index] for index in range(0, 8, 2))
        await until(engine, active=0, queued_tokens=0)


async def test_a_stream_may_be_closed_by_another_task_while_it_is_read() -> None:
    engine, session = fake_engine()
    session.hold()
    async with running(engine), trio.open_nursery() as nursery:
        stream = engine.submit(PROMPTS[0], greedy(200), FAR)

        async def read_until_closed() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await stream.receive()

        nursery.start_soon(read_until_closed)
        await trio.testing.wait_all_tasks_blocked()
        await stream.aclose()


async def test_a_full_queue_refuses_with_counts_and_a_time_to_come_back() -> None:
    engine, session = fake_engine(slots=2, queue_limit=QUEUE_LIMIT)
    session.hold()
    async with running(engine):
        streams = [engine.submit(PROMPTS[0], greedy(5), FAR) for _ in range(2 + QUEUE_LIMIT)]
        statistics = engine.statistics()
        assert (statistics.active, statistics.queued, statistics.free_slots) == (2, QUEUE_LIMIT, 0)
        with pytest.raises(QueueFull) as raised:
            engine.submit(PROMPTS[0], greedy(5), FAR)
        assert (raised.value.queued, raised.value.limit) == (QUEUE_LIMIT, QUEUE_LIMIT)
        assert 1.0 <= raised.value.retry_after_s <= 60.0
        session.release()
        assert len({(await read(stream))[:2] for stream in streams}) == 1


async def test_one_asker_cannot_keep_the_others_out_of_the_queue() -> None:
    engine, session = fake_engine(slots=1, queue_limit=3)
    session.hold()
    async with running(engine):
        streams = [engine.submit(PROMPTS[0], greedy(5), FAR, fairness_id="much") for _ in range(4)]
        other = engine.submit(PROMPTS[0], greedy(5), FAR, fairness_id="little")
        with pytest.raises(QueueFull) as raised:
            await streams.pop().receive()
        assert (raised.value.queued, raised.value.limit) == (3, 3)
        assert 1.0 <= raised.value.retry_after_s <= 60.0
        with pytest.raises(QueueFull):
            engine.submit(PROMPTS[0], greedy(5), FAR, fairness_id="much")
        assert engine.statistics().queued == 3
        session.release()
        assert len({(await read(stream))[:2] for stream in (*streams, other)}) == 1


@pytest.mark.parametrize("is_running", [False, True], ids=["waiting", "running"])
async def test_a_request_past_its_deadline_ends_with_an_error(is_running: bool) -> None:
    clock = Clock()
    engine, session = fake_engine(slots=1, clock=clock)
    session.hold()
    async with running(engine):
        other = engine.submit(PROMPTS[0], greedy(3 if not is_running else 1), FAR)
        late = engine.submit(PROMPTS[2], greedy(200), clock.now + 5)
        if is_running:
            session.allow(2)
            await late.receive()
        clock.now += 5
        session.release()
        with pytest.raises(DeadlinePassed):
            await drain(late)
        await read(other)
        await until(engine, active=0, free_slots=1)


async def test_a_machine_that_stood_still_has_no_stuck_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_watch, "WATCH_INTERVAL_S", 0.001)
    monkeypatch.setattr(step_watch, "PAUSE_S", -1.0)  # every watch comes too late
    clock = Clock()
    engine, session = fake_engine(clock=clock)
    async with running(engine):
        await read(engine.submit(PROMPTS[0], greedy(), FAR))
        session.hold()
        begun = session.entered
        stream = engine.submit(PROMPTS[0], greedy(3), FAR)
        await until_entered(session, begun + 1)
        clock.now += 1_000
        await trio.sleep(0.02)
        assert engine.statistics().state == READY
        session.release()
        assert len((await read(stream))[1]) == 3


async def test_logits_that_are_no_numbers_end_their_request_alone() -> None:
    engine, session = fake_engine()
    session.poison = 511
    async with running(engine):
        expected = await read(engine.submit(PROMPTS[0], greedy(), FAR))
        assert session.poison not in expected[1]
        good = engine.submit(PROMPTS[0], greedy(), FAR)
        bad = engine.submit([5, session.poison], greedy(), FAR)
        with pytest.raises(EngineFault, match="not finite"):
            await bad.receive()
        with pytest.raises(trio.EndOfChannel):
            await bad.receive()
        assert await read(good) == expected
        assert engine.statistics().state == READY


async def held_in_its_first_step(engine: Engine, session: FakeSession) -> tuple[EngineStream, int]:
    """A request whose prompt is done, held in its first decode step; and the calls that had begun before it."""
    session.hold()
    begun = session.entered
    stream = engine.submit(PROMPTS[0], greedy(), FAR)
    session.allow()
    await until_entered(session, begun + 2)
    return stream, begun


async def test_a_step_that_breaks_ends_its_own_requests_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    engine, session = fake_engine(slots=2)
    async with running(engine):
        expected = await read(engine.submit(PROMPTS[2], greedy(), FAR))
        decoding, _ = await held_in_its_first_step(engine, session)
        arriving = engine.submit(PROMPTS[2], greedy(), FAR)
        waiting = engine.submit(PROMPTS[2], greedy(), FAR)
        session.failures = 1
        session.release()
        with pytest.raises(EngineFault, match="in the middle"):
            await drain(decoding)
        assert [await read(stream) for stream in (arriving, waiting)] == [expected, expected]
        statistics = engine.statistics()
        assert (statistics.state, statistics.step_faults_total, session.recoveries) == (READY, 1, 1)
    assert [record.message[:28] for record in caplog.records] == ["a step of the engine failed;"]


async def test_a_chunk_that_breaks_leaves_the_decode_step_before_it_as_it_was() -> None:
    engine, session = fake_engine(slots=2)
    async with running(engine):
        expected = await read(engine.submit(PROMPTS[0], greedy(), FAR))
        decoding, begun = await held_in_its_first_step(engine, session)
        arriving = engine.submit(PROMPTS[3], greedy(), FAR)
        session.allow(2)  # the step under way, and the decode step of the tick that prefills the other
        await until_entered(session, begun + 4)
        session.failures = 1
        session.release()
        with pytest.raises(EngineFault):
            await arriving.receive()
        assert await read(decoding) == expected


async def test_a_prompt_that_nobody_waits_for_is_prefilled_in_large_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(executor, "time", SimpleNamespace(perf_counter=lambda: next(clock) / 1000))
    session = FakeSession(2, chunk_blocks_max=4)
    engine = Engine(toy_model(), session, queue_limit=9, now=Clock())
    async with running(engine):
        for prompt, chunks in (([7] * 70, 2), ([8, *range(100, 340)], 1)):
            before, steps = session.entered, len(session.batches)
            await read(engine.submit(prompt, greedy(3), FAR))
            assert session.entered - before - (len(session.batches) - steps) == chunks


async def test_of_several_chunks_of_an_answer_begun_elsewhere_the_second_may_break() -> None:
    long_prompt = [300 + i % 90 for i in range(150)]
    elsewhere, _ = fake_engine()
    async with running(elsewhere):
        _, whole, _ = await read(elsewhere.submit(long_prompt, greedy(60), FAR))
    engine, session = fake_engine(slots=2)
    async with running(engine):
        expected = await read(engine.submit(PROMPTS[0], greedy(), FAR))
        decoding, begun = await held_in_its_first_step(engine, session)
        resumed = engine.submit(long_prompt, greedy(60), FAR, generated_ids=whole[:50], resume="prefill")
        session.allow(3)  # the step under way, the decode step of the next tick, and the first of four chunks
        await until_entered(session, begun + 5)
        session.failures = 1
        session.release()
        with pytest.raises(EngineFault):
            await resumed.receive()
        assert await read(decoding) == expected
        again = engine.submit(long_prompt, greedy(60), FAR, generated_ids=whole[:50], resume="prefill")
        assert (await read(again))[1] == whole[50:]
        statistics = engine.statistics()
        assert (statistics.queued_tokens, statistics.free_slots, statistics.step_faults_total) == (0, 2, 1)


async def test_an_engine_whose_steps_break_one_after_the_other_gives_up(caplog: pytest.LogCaptureFixture) -> None:
    engine, session = fake_engine(slots=1)
    session.hold()
    async with running(engine):
        streams = [engine.submit(PROMPTS[0], greedy(), FAR) for _ in range(5)]
        session.allow()
        await streams[0].receive()
        session.failures = 99
        session.release()
        for stream in streams:
            with pytest.raises(EngineFault):
                await drain(stream)
        statistics = engine.statistics()
        assert (statistics.state, statistics.active, statistics.queued) == (FAILED, 0, 0)
        with pytest.raises(EngineFault, match="has failed"):
            engine.submit(PROMPTS[0], greedy(), FAR)
        await streams[0].aclose()
    assert [record.message[:28] for record in caplog.records] == ["a step of the engine failed;"] * 2 + [
        "the engine has failed"
    ]


async def test_a_step_that_does_not_return_makes_the_engine_stuck_until_it_does(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_watch, "WATCH_INTERVAL_S", 0.001)
    clock = Clock()
    engine, session = fake_engine(clock=clock)
    async with running(engine):
        await read(engine.submit(PROMPTS[0], greedy(), FAR))
        session.hold()
        begun = session.entered
        stream = engine.submit(PROMPTS[0], greedy(3), FAR)
        await until_entered(session, begun + 1)
        clock.now += step_watch.STUCK_MIN_S
        await trio.sleep(0.01)
        assert engine.statistics().state == READY
        clock.now += 0.1
        await until(engine, state=STUCK)
        with pytest.raises(EngineFault, match="does not return"):
            engine.submit(PROMPTS[0], greedy(3), FAR)
        with pytest.raises(EngineFault, match="does not return"):
            await stream.receive()
        session.release()
        await until(engine, state=READY, active=0)
        assert len((await read(engine.submit(PROMPTS[0], greedy(3), FAR)))[1]) == 3
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    assert "in decode" in caplog.records[0].stack or "in prefill" in caplog.records[0].stack  # type: ignore[attr-defined]


async def test_a_reader_that_takes_nothing_is_ended_and_costs_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "STREAM_EVENTS_MAX", 5)
    engine, _ = fake_engine()
    async with running(engine):
        stream = engine.submit(PROMPTS[0], greedy(100), FAR)
        await until_delivered(engine)
        await until(engine, active=0, free_slots=4)
        event = await stream.receive()
        assert len(event.token_ids) == 5
        with pytest.raises(EngineOverflow, match="5 events unread"):
            await stream.receive()


async def test_readers_of_an_engine_that_stops_are_told() -> None:
    engine, session = fake_engine()
    assert engine.statistics().state == LOADING
    with pytest.raises(EngineStopped):
        engine.submit(PROMPTS[0], greedy(), FAR)
    session.hold()
    async with running(engine):
        stream = engine.submit(PROMPTS[0], greedy(), FAR)
        assert engine.statistics().state == READY
    with pytest.raises(EngineStopped):
        await drain(stream)
    with pytest.raises(EngineStopped):
        engine.submit(PROMPTS[0], greedy(), FAR)
    await stream.aclose()


async def test_statistics_tell_what_was_done() -> None:
    engine, session = fake_engine(slots=2)
    async with running(engine):
        for _ in range(3):
            await read(engine.submit(PROMPTS[3], greedy(10), FAR))
        await until(engine, active=0)
        statistics = engine.statistics()
    assert statistics.tokens_generated_total == 30
    # 131 tokens, of which the second and third time all but the last are there already.
    assert statistics.prompt_tokens_total == 131 + 1 + 1
    assert statistics.step_count == (3 + 9) + 2 * (1 + 9)
    assert (statistics.cache_queries_total, statistics.cache_hits_total) == (3, 2)
    assert (statistics.cache_query_tokens_total, statistics.cache_hit_tokens_total) == (3 * 131, 2 * 130)
    assert statistics.first_token_error > 0
    assert statistics.first_token.seconds(1_000) > statistics.first_token.seconds(10) > 0
    assert (statistics.active, statistics.queued, statistics.free_slots, statistics.slots) == (0, 0, 2, 2)
    assert statistics.queued_tokens == 0
    assert statistics.tokens_per_s == pytest.approx(3.0, rel=0.2)
    assert statistics.prefill_rate > 0
    assert statistics.decode_rate > 0
    assert statistics.median_step_s > 0
    assert 0 < statistics.session_seconds_total < statistics.step_seconds_total
    assert statistics.kv_bytes == session.kv_bytes
    assert statistics.model_memory_bytes == session.kv_bytes + 1_000


async def test_tokens_per_second_is_zero_when_idle() -> None:
    clock = Clock()
    engine, _ = fake_engine(clock=clock)
    async with running(engine):
        assert engine.statistics().tokens_per_s == 0.0
        await read(engine.submit(PROMPTS[0], greedy(10), FAR))
        clock.now += 9.9
        assert engine.statistics().tokens_per_s > 0.0
        clock.now += 1.0
        assert engine.statistics().tokens_per_s == 0.0


def test_a_broken_graph_is_found_while_loading(folder: ModelFolder, tmp_path: Path) -> None:
    for file in folder.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"garbage")
    load = partial(load_engine, slots=1, queue_limit=1, threads=1, provider="cpu")
    with pytest.raises(ModelFolderInvalid, match=r"model\.onnx cannot be loaded"):
        load(read_model_folder(tmp_path))
    engine = load(folder)
    assert engine.statistics().load_time_s > 0
    assert engine.context_length == folder.context_length
    assert len(engine.fingerprint) >= 16


@pytest.mark.parametrize("resume", ["prefill", "replay", "auto"])
@pytest.mark.parametrize("kind", ["greedy", "seeded"])
async def test_an_answer_begun_elsewhere_goes_on_at_its_next_token(engine: Engine, kind: str, resume: Resume) -> None:
    params = greedy(40) if kind == "greedy" else SamplingParams(temperature=1.2, seed=5, max_tokens=40, is_seeded=True)
    async with running(engine):
        for prompt in (PROMPTS[0], PROMPTS[5], PROMPTS[7]):
            text, ids, _ = await read(engine.submit(prompt, params, FAR))
            for count in (1, 7, 39):
                before = "".join(map(engine.model.tokenizer.decoder().feed, ids[:count]))
                stream = engine.submit(prompt, params, FAR, generated_ids=ids[:count], resume=resume)
                rest, rest_ids, last = await read(stream)
                assert (before + rest, ids[:count] + rest_ids) == (text, ids)
                assert (last.prompt_tokens, last.completion_tokens) == (len(prompt), len(ids))


async def test_a_replay_computes_the_prompt_in_chunks_and_the_answer_in_steps() -> None:
    for is_exact, params, prefilled in (
        (False, greedy(60), 71),
        (False, SamplingParams(seed=1, is_seeded=True, max_tokens=60), 71),
        (False, SamplingParams(seed=1, max_tokens=60), 121),
        (True, greedy(60), 121),
    ):
        engine, session = fake_engine(is_exact=is_exact)
        async with running(engine):
            stream = engine.submit(PROMPTS[1], params, FAR, generated_ids=list(range(100, 150)))
            assert len((await read(stream))[1]) == 10
        assert session.prefilled == prefilled


@pytest.mark.parametrize(
    ("params", "generated", "finish_reason"),
    [({"max_tokens": 3}, "abc", "length"), ({"max_tokens": 9, "stop": ("bc",)}, "abc", "stop")],
)
async def test_an_answer_that_was_complete_when_its_node_died_just_ends(
    params: dict[str, object], generated: str, finish_reason: str
) -> None:
    engine, _ = fake_engine()
    ids = engine.model.tokenizer.encode(generated)
    assert len(ids) == 3
    async with running(engine):
        stream = engine.submit(PROMPTS[0], SamplingParams(**params), FAR, generated_ids=ids)  # type: ignore[arg-type]
        event = await stream.receive()
        assert (event.token_ids, event.finish_reason, event.completion_tokens) == ((), finish_reason, 3)
        with pytest.raises(trio.EndOfChannel):
            await stream.receive()
        assert engine.statistics().active == 0


async def test_what_is_cached_does_not_change_what_comes(engine: Engine) -> None:
    system = [40 + i % 50 for i in range(150)]
    prompts = [[*system, 100 + i, *range(20, 20 + i * 9)] for i in range(7)]
    async with running(engine):
        cold = []
        for prompt in prompts:
            cold.append((await read(engine.submit(prompt, greedy(20), FAR)))[:2])
            for other in range(8):  # push out whatever is cached
                await read(engine.submit([200 + other] * 65, greedy(1), FAR))
        warm = [(await read(engine.submit(prompt, greedy(20), FAR)))[:2] for prompt in prompts]
        found: dict[int, tuple[str, tuple[int, ...]]] = {}

        async def one(index: int) -> None:
            text, ids, last = await read(engine.submit(prompts[index], greedy(20), FAR))
            found[index] = text, ids
            assert last.cached_tokens >= 128

        async with trio.open_nursery() as nursery:
            for index in range(len(prompts)):
                nursery.start_soon(one, index)
    assert warm == cold == [found[index] for index in range(len(prompts))]


async def test_the_engine_names_the_conversations_whose_rows_are_there() -> None:
    engine, _ = fake_engine()
    async with running(engine):
        await read(engine.submit(PROMPTS[3], greedy(1), FAR, text_blocks=(7, 8)))
        await read(engine.submit(PROMPTS[0], greedy(1), FAR, text_blocks=(9,)))
        await until(engine, active=0)
        await read(engine.submit([99], greedy(1), FAR))
        assert engine.cached_conversations() == [(7, 8)], "what is shorter than a block is not kept"


SCHEMA = GrammarSpec(
    "json_schema",
    '{"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"enum": ["one", "two", "three"]}}, '
    '"required": ["a", "b"], "additionalProperties": false}',
)


@pytest.mark.parametrize("resume", ["prefill", "replay"])
async def test_a_grammar_holds_in_a_batch_and_after_a_resume(engine: Engine, resume: Resume) -> None:
    params = SamplingParams(temperature=1.0, seed=3, is_seeded=True, max_tokens=200, grammar=SCHEMA)
    async with running(engine), trio.open_nursery() as nursery:
        for prompt in PROMPTS[:3]:  # others beside it, which know no grammar
            nursery.start_soon(read, engine.submit(prompt, greedy(150), FAR))
        text, ids, last = await read(engine.submit(PROMPTS[4], params, FAR, matcher=engine.compile_grammar(SCHEMA)))
        assert json.loads(text).keys() == {"a", "b"}
        assert last.finish_reason == "stop"
        half = len(ids) // 2
        stream = engine.submit(
            PROMPTS[4], params, FAR, generated_ids=ids[:half], resume=resume, matcher=engine.compile_grammar(SCHEMA)
        )
        assert (await read(stream))[1] == ids[half:]


async def test_a_token_that_the_grammar_does_not_take_is_refused_before_anything_is_queued() -> None:
    engine, _ = fake_engine()
    params = greedy(grammar=SCHEMA)
    async with running(engine):
        with pytest.raises(EngineFault, match="grammar does not take token 99"):
            engine.submit(PROMPTS[0], params, FAR, generated_ids=[99], matcher=engine.compile_grammar(SCHEMA))
        assert engine.statistics().active == 0


@pytest.mark.parametrize(
    "options", [{"presence_penalty": 1.5}, {"repetition_penalty": 1.3}, {"frequency_penalty": 2.0}]
)
async def test_penalties_count_what_was_generated_elsewhere(engine: Engine, options: dict[str, float]) -> None:
    params = greedy(40, **options, logprobs=2)
    async with running(engine):
        _, ids, last = await read(engine.submit(PROMPTS[4], params, FAR))
        assert [entry.token_id for entry in last.logprobs] == list(ids)
        for resume in ("prefill", "replay"):
            stream = engine.submit(PROMPTS[4], params, FAR, generated_ids=ids[:20], resume=resume)
            _, rest, resumed = await read(stream)
            assert rest == ids[20:]
            assert [entry.token_id for entry in resumed.logprobs] == list(rest)


@pytest.mark.parametrize(
    ("params", "slots", "is_exact", "rows"),
    [
        (greedy(5), 4, False, 2),
        (SamplingParams(seed=1, is_seeded=True, max_tokens=5), 4, False, 2),
        (SamplingParams(seed=1, max_tokens=5), 4, False, 1),
        (greedy(5), 1, False, 1),
        (greedy(5), 4, True, 1),
    ],
    ids=["greedy", "seeded", "neither", "one slot", "exact model"],
)
async def test_who_must_not_depend_on_company_never_decodes_alone(
    params: SamplingParams, slots: int, is_exact: bool, rows: int
) -> None:
    engine, session = fake_engine(slots=slots, is_exact=is_exact)
    async with running(engine):
        assert len((await read(engine.submit(PROMPTS[0], params, FAR)))[1]) == 5
    assert set(session.batches) == {rows}


async def test_rows_that_may_be_no_numbers_are_not_cached() -> None:
    engine, session = fake_engine()
    async with running(engine):
        session.poison = PROMPTS[7][150]
        with pytest.raises(EngineFault, match="not finite"):
            await drain(engine.submit(PROMPTS[7], greedy(), FAR))
        session.poison = -1
        await until(engine, active=0)
        assert len((await read(engine.submit(PROMPTS[7], greedy(5), FAR)))[1]) == 5
        assert engine.statistics().cache_hits_total == 0


@pytest.mark.parametrize("error", [RuntimeError, BaseException], ids=["error", "panic of the tokenizer's own code"])
async def test_text_that_cannot_be_made_ends_its_own_request(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    class Broken:
        def feed(self, token_id: int) -> str:
            raise error("no text")

    engine, _ = fake_engine()
    async with running(engine):
        expected = await read(engine.submit(PROMPTS[0], greedy(), FAR))
        good = engine.submit(PROMPTS[0], greedy(), FAR)
        with monkeypatch.context() as patch:
            patch.setattr(type(engine.model.tokenizer), "decoder", lambda self: Broken())
            bad = engine.submit(PROMPTS[2], greedy(), FAR)
        with pytest.raises(EngineFault, match="text cannot be made"):
            await bad.receive()
        assert await read(good) == expected
        assert engine.statistics().state == READY


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_whatever_ends_the_engine_thread_readers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def panic(*arguments: object) -> None:
        raise BaseException("a panic")

    engine, session = fake_engine()
    session.hold()
    async with running(engine):
        stream = engine.submit(PROMPTS[0], greedy(), FAR)
        monkeypatch.setattr(engine._scheduler, "commit", panic)
        session.release()
        with pytest.raises(EngineFault):
            await drain(stream)
        assert engine.statistics().state == FAILED


@pytest.mark.parametrize(("prompt", "generated"), [([5, 600], []), ([-1], []), ([5], [7, 2**40])])
async def test_ids_that_the_model_does_not_have_are_refused(prompt: list[int], generated: list[int]) -> None:
    engine, _ = fake_engine()
    async with running(engine):
        with pytest.raises(TokenUnknown, match="not among the 512"):
            engine.submit(prompt, greedy(), FAR, generated_ids=generated)
        assert engine.statistics().active == 0


async def test_an_answer_that_had_filled_the_capacity_just_ends() -> None:
    engine, _ = fake_engine()
    async with running(engine):
        _, ids, _ = await read(engine.submit([5] * (CAPACITY - 3), greedy(None), FAR))
        stream = engine.submit([5] * (CAPACITY - 3), greedy(None), FAR, generated_ids=ids)
        assert (await stream.receive()).finish_reason == "length"
        with pytest.raises(PromptTooLong):
            engine.submit([5] * (CAPACITY - 3), greedy(None), FAR, generated_ids=[*ids, 5])
