"""The embedding engine over a fake session: who shares steps, who fails with whom, who waits and for how long."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest
import trio
import trio.testing

from nodes.engine.embedding_engine import EmbeddingEngine
from nodes.engine.embedding_folder import LoadedEmbeddingModel
from nodes.engine.embedding_queue import IntArray
from nodes.engine.engine_statistics import FAILED, LOADING, READY, STUCK
from nodes.engine.errors import DeadlinePassed, EngineFault, EngineStopped, InputTooLong, QueueFull, TokenUnknown
from nodes.engine.pooling import FloatArray
from nodes.engine.step_thread import FAULTS_MAX
from nodes.engine.tokenizer import Tokenizer
from nodes.model_tools.random_llama import small_tokenizer
from tests.unit.fake_session import Clock

VOCABULARY, CONTEXT = 512, 32
POISON, NAN = 500, 501  # a step with this token raises; a row with that one is no number
HANG_S = 10.0


class FakeEmbeddingSession:
    """A vector of an input is its length, its sum and its first id. A held session takes the steps it is allowed."""

    dimensions = 3
    rows_max = 8
    step_tokens = 256

    def __init__(self) -> None:
        self.steps: list[list[list[int]]] = []
        self.is_broken = False
        self._allowed: threading.Semaphore | None = None

    def hold(self) -> None:
        self._allowed = threading.Semaphore(0)

    def allow(self, steps: int = 1) -> None:
        assert self._allowed is not None
        for _ in range(steps):
            self._allowed.release()

    def embed(self, inputs: Sequence[IntArray]) -> FloatArray:
        self.steps.append([ids.tolist() for ids in inputs])
        if self._allowed is not None:
            self._allowed.acquire()
        if self.is_broken or any(POISON in ids for ids in inputs):
            raise RuntimeError("the fake session was told to fail")
        rows = [(len(ids), ids.sum(), ids[0]) for ids in inputs]
        vectors = np.array(rows, np.float32)
        vectors[[NAN in ids for ids in inputs]] = np.nan
        return vectors


def expected(ids: list[int]) -> list[float]:
    return [len(ids), sum(ids), ids[0]]


def engine_of(session: FakeEmbeddingSession, queue_limit: int = 10, clock: Clock | None = None) -> EmbeddingEngine:
    model = LoadedEmbeddingModel("toy", Tokenizer(small_tokenizer(VOCABULARY)), VOCABULARY, CONTEXT, weight_bytes=100)
    return EmbeddingEngine(model, session, queue_limit=queue_limit, now=clock or time.monotonic)


@asynccontextmanager
async def running(engine: EmbeddingEngine, session: FakeEmbeddingSession) -> AsyncIterator[EmbeddingEngine]:
    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            try:
                yield engine
            finally:
                nursery.cancel_scope.cancel()
                if session._allowed is not None:
                    with trio.CancelScope(shield=True):
                        await trio.testing.wait_all_tasks_blocked()  # the engine has been told to stop
                    session.allow(100)


async def embed(engine: EmbeddingEngine, *inputs: list[int], seconds: float = HANG_S) -> FloatArray:
    return await engine.embed(engine.checked(inputs), engine.now() + seconds)


async def until_steps(session: FakeEmbeddingSession, steps: int) -> None:
    while len(session.steps) < steps:
        await trio.sleep(0.001)  # lets the engine's thread have the interpreter; no test depends on how long


class Outcomes:
    """What became of requests that run beside each other."""

    def __init__(self, nursery: trio.Nursery, engine: EmbeddingEngine) -> None:
        self.found: dict[str, list[list[float]] | Exception] = {}
        self.scopes: dict[str, trio.CancelScope] = {}
        self._nursery = nursery
        self._engine = engine

    async def start(self, name: str, *inputs: list[int]) -> None:
        """Returns once the request is queued."""
        self.scopes[name] = trio.CancelScope()

        async def run() -> None:
            with self.scopes[name]:
                try:
                    self.found[name] = (await embed(self._engine, *inputs)).tolist()
                except Exception as exc:
                    self.found[name] = exc

        before = len(self._engine._pending)
        self._nursery.start_soon(run)
        while len(self._engine._pending) == before:
            await trio.sleep(0)


async def test_vectors_come_in_the_order_of_the_inputs() -> None:
    session = FakeEmbeddingSession()
    inputs = [[5], [9, 1, 2], [7] * CONTEXT, [8, 8], *[[index + 1] * (index % 20 + 1) for index in range(60)]]
    async with running(engine_of(session), session) as engine:
        vectors = await embed(engine, *inputs)
    assert vectors.tolist() == [expected(ids) for ids in inputs]
    assert len(session.steps) < len(inputs) / 3


async def test_requests_that_wait_are_computed_together() -> None:
    session = FakeEmbeddingSession()
    session.hold()
    async with running(engine_of(session), session) as engine, trio.open_nursery() as nursery:
        outcomes = Outcomes(nursery, engine)
        await outcomes.start("first", [1])
        await until_steps(session, 1)
        for index in range(4):
            await outcomes.start(str(index), [index + 2])
        statistics = engine.statistics()
        assert (statistics.active, statistics.queued, statistics.free_slots) == (1, 4, 7)
        assert statistics.queued_tokens == 4
        session.allow(2)
    assert [len(step) for step in session.steps] == [1, 4]
    assert outcomes.found["3"] == [expected([5])]
    statistics = engine.statistics()
    assert (statistics.active, statistics.queued, statistics.prompt_tokens_total, statistics.step_count) == (0, 0, 5, 2)


async def test_a_step_that_throws_fails_its_own_requests_and_no_others() -> None:
    session = FakeEmbeddingSession()
    session.hold()
    async with running(engine_of(session), session) as engine, trio.open_nursery() as nursery:
        outcomes = Outcomes(nursery, engine)
        await outcomes.start("first", [1])
        await until_steps(session, 1)
        await outcomes.start("good", [4, 4])
        await outcomes.start("bad", [POISON, 1], [3] * CONTEXT)
        await outcomes.start("also good", [5, 5], [5])
        session.allow(20)
    assert isinstance(outcomes.found["bad"], EngineFault)
    assert outcomes.found["good"] == [expected([4, 4])]
    assert outcomes.found["also good"] == [expected([5, 5]), expected([5])]
    assert any([POISON, 1] in step and [4, 4] in step for step in session.steps)
    assert engine.statistics().step_faults_total == 1


async def test_a_vector_that_is_no_number_fails_its_own_request_alone() -> None:
    session = FakeEmbeddingSession()
    session.hold()
    async with running(engine_of(session), session) as engine, trio.open_nursery() as nursery:
        outcomes = Outcomes(nursery, engine)
        await outcomes.start("first", [1])
        await until_steps(session, 1)
        await outcomes.start("bad", [NAN])
        await outcomes.start("good", [4])
        session.allow(2)
    assert isinstance(outcomes.found["bad"], EngineFault)
    assert outcomes.found["good"] == [expected([4])]


async def test_steps_that_break_one_after_the_other_end_the_engine() -> None:
    session = FakeEmbeddingSession()
    async with running(engine_of(session), session) as engine:
        assert engine.statistics().state is READY
        for _ in range(FAULTS_MAX):
            session.is_broken = True
            with pytest.raises(EngineFault):
                await embed(engine, [2])
        while engine.statistics().state is not FAILED:
            await trio.sleep(0.001)
        with pytest.raises(EngineFault, match="the log says why"):
            await embed(engine, [1])


async def test_a_step_that_goes_well_forgives_those_before() -> None:
    session = FakeEmbeddingSession()
    async with running(engine_of(session), session) as engine:
        for _ in range(FAULTS_MAX):
            session.is_broken = True
            with pytest.raises(EngineFault):
                await embed(engine, [2])
            while engine._thread.step_began is not None:
                await trio.sleep(0.001)
            session.is_broken = False
            await embed(engine, [1])
        assert engine.statistics().state is READY


async def test_an_input_that_breaks_the_model_again_and_again_does_not_end_the_engine() -> None:
    session = FakeEmbeddingSession()
    async with running(engine_of(session), session) as engine:
        for _ in range(2 * FAULTS_MAX):
            with pytest.raises(EngineFault):
                await embed(engine, [POISON])
        assert (await embed(engine, [1])).tolist() == [expected([1])]
        assert engine.statistics().state is READY
        assert engine.statistics().step_faults_total == 2 * FAULTS_MAX


async def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    session = FakeEmbeddingSession()
    session.hold()
    async with running(engine_of(session, queue_limit=2), session) as engine, trio.open_nursery() as nursery:
        outcomes = Outcomes(nursery, engine)
        await outcomes.start("first", [1])
        await until_steps(session, 1)
        await outcomes.start("second", [1])
        await outcomes.start("third", [1])
        with pytest.raises(QueueFull) as raised:
            await embed(engine, [1])
        assert raised.value.retry_after_s >= 1.0
        session.allow(5)
    assert all(isinstance(found, list) for found in outcomes.found.values())


async def test_a_cancelled_request_frees_its_place_and_its_inputs_are_not_computed() -> None:
    session = FakeEmbeddingSession()
    session.hold()
    async with running(engine_of(session, queue_limit=1), session) as engine, trio.open_nursery() as nursery:
        outcomes = Outcomes(nursery, engine)
        await outcomes.start("first", [1])
        await until_steps(session, 1)
        await outcomes.start("left", [2])
        outcomes.scopes["left"].cancel()
        while engine.statistics().queued:
            await trio.sleep(0)
        await outcomes.start("next", [3])
        session.allow(5)
    assert "left" not in outcomes.found
    assert [[2]] not in session.steps
    assert outcomes.found["next"] == [expected([3])]


async def test_a_request_that_waits_ends_at_its_deadline_and_frees_its_place() -> None:
    session = FakeEmbeddingSession()
    session.hold()
    async with running(engine_of(session), session) as engine, trio.open_nursery() as nursery:
        outcomes = Outcomes(nursery, engine)
        await outcomes.start("runs", [1])
        await until_steps(session, 1)
        with pytest.raises(DeadlinePassed):
            await embed(engine, [2], seconds=0.0)
        assert engine.statistics().queued == 0
        session.allow(5)
    assert outcomes.found["runs"] == [expected([1])]


async def test_a_stopped_engine_tells_those_who_wait_and_those_who_come() -> None:
    session = FakeEmbeddingSession()
    session.hold()
    engine = engine_of(session)
    assert engine.statistics().state is LOADING
    with pytest.raises(EngineStopped):
        await embed(engine, [1])
    async with trio.open_nursery() as nursery, running(engine, session):
        outcomes = Outcomes(nursery, engine)
        await outcomes.start("first", [1])
        await until_steps(session, 1)
        await outcomes.start("waits", [2])
    assert isinstance(outcomes.found["waits"], EngineStopped)
    with pytest.raises(EngineStopped):
        await embed(engine, [1])


async def test_a_step_that_does_not_return_ends_its_requests_until_it_does() -> None:
    session, clock = FakeEmbeddingSession(), Clock()
    session.hold()
    async with running(engine_of(session, clock=clock), session) as engine, trio.open_nursery() as nursery:
        outcomes = Outcomes(nursery, engine)
        await outcomes.start("first", [1])
        await until_steps(session, 1)
        clock.now += 1_000
        engine._watch.look(0.0)
        assert engine.statistics().state is STUCK
        with pytest.raises(EngineFault, match="does not return"):
            await embed(engine, [1])
        session.allow(5)
        while engine._thread.step_began is not None:
            await trio.sleep(0.001)
        engine._watch.look(0.0)
        assert engine.statistics().state is READY
        assert (await embed(engine, [7])).tolist() == [expected([7])]
    assert isinstance(outcomes.found["first"], EngineFault)


@pytest.mark.parametrize(
    ("ids", "error"), [([1] * (CONTEXT + 1), InputTooLong), ([VOCABULARY], TokenUnknown), ([3, -1], TokenUnknown)]
)
async def test_what_the_model_does_not_take_is_refused_before_it_is_queued(
    ids: list[int], error: type[Exception]
) -> None:
    engine = engine_of(FakeEmbeddingSession())
    with pytest.raises(error):
        engine.checked([ids])
    assert len(engine.checked([[1] * CONTEXT])[0]) == CONTEXT


async def test_the_estimate_grows_with_what_waits() -> None:
    session = FakeEmbeddingSession()
    session.hold()
    async with running(engine_of(session), session) as engine, trio.open_nursery() as nursery:
        idle = engine.statistics().first_token
        outcomes = Outcomes(nursery, engine)
        await outcomes.start("first", [1])
        await until_steps(session, 1)
        await outcomes.start("second", *[[1] * CONTEXT] * 20)
        busy = engine.statistics().first_token
        session.allow(20)
    assert idle.wait_s == 0.0
    assert busy.wait_s >= 20 * CONTEXT * busy.prompt_token_s
