"""Random traffic through scheduler and executor: whatever comes and goes, each request gets what it gets alone.

Shared beginnings, few slots, cancellations, steps that break, answers begun elsewhere, sessions whose rows must not be
mixed and whose single rows are padded: FakeSession's logits are a hash of the context, so a row that is not the
request's own changes its tokens.
"""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodes.engine.errors import EngineFault
from nodes.engine.executor import Executor
from nodes.engine.kv_slots import BLOCK_TOKENS
from nodes.engine.logit_rows import BLOCK_LOGITS, LogitBlocks
from nodes.engine.sampling import SamplingParams
from nodes.engine.scheduler import Scheduler
from nodes.engine.sequence import Phase, Sequence
from tests.unit.fake_session import CAPACITY, VOCABULARY, FakeSession
from tests.unit.test_sequence import LetterDecoder

REQUESTS = 12
TICKS_MAX = 20_000


class Traffic:
    """A scheduler, its executor and the session that they run."""

    def __init__(self, session: FakeSession) -> None:
        self.session = session
        slots, is_exact = session.slots, session.is_exact
        chunk_tokens_max = self.session.prefill_tokens_max
        self.scheduler = Scheduler(slots, REQUESTS, mixes_rows=is_exact, chunk_tokens_max=chunk_tokens_max)
        self.executor = Executor(self.session)

    def tick(self) -> bool:
        """One tick as the engine does it; False when there was nothing to do."""
        scheduler = self.scheduler
        plan = scheduler.plan(0.0)
        if not plan.has_steps:
            return False
        for chunk in plan.prefill:
            assert chunk.is_last or (chunk.start + len(chunk.token_ids)) % BLOCK_TOKENS == 0
        done = self.executor.execute(plan, scheduler.kv)
        if done.fault is None:
            scheduler.commit(plan, done.tokens, done.first_token, 1e-6)
            return True
        if not isinstance(done.fault, RuntimeError):
            raise done.fault
        if done.tokens:
            scheduler.commit(replace(plan, prefill=()), done.tokens, None)
        scheduler.fail(done.broken, EngineFault("told to"))
        return True


def request(ids: list[int], params: SamplingParams, generated: list[int], *, replays: bool) -> Sequence:
    return Sequence(
        ids,
        params,
        LetterDecoder(),
        eos_ids=frozenset(),
        capacity=CAPACITY,
        deadline=1e9,
        generated_ids=generated,
        replays=replays,
    )


def alone(ids: list[int], params: SamplingParams) -> list[int]:
    traffic = Traffic(FakeSession(1))
    one = request(ids, params, [], replays=False)
    traffic.scheduler.submit(one)
    while traffic.tick():
        pass
    traffic.executor.close()
    return one.generated_ids


class MisleadingSession(FakeSession):
    """Says that the largest logit is one of the last block."""

    def _blocks_of(self, logits: npt.NDArray[np.float32]) -> LogitBlocks:
        maxima = np.zeros((len(logits), VOCABULARY // BLOCK_LOGITS), np.float32)
        maxima[:, -1] = 1.0
        return LogitBlocks(logits, maxima, logits.sum(axis=1))


def test_tokens_are_looked_for_where_the_session_says_that_they_are() -> None:
    traffic = Traffic(MisleadingSession(1, has_blocks=True))
    one = request([3, 4], SamplingParams(temperature=0.0, max_tokens=5), [], replays=False)
    traffic.scheduler.submit(one)
    while traffic.tick():
        pass
    traffic.executor.close()
    assert len(one.generated_ids) == 5
    assert min(one.generated_ids[1:]) >= VOCABULARY - BLOCK_LOGITS  # the first is of the prompt's last chunk


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), slots=st.integers(1, 4), is_exact=st.booleans(), is_calm=st.booleans())
def test_every_request_gets_what_it_gets_alone(seed: int, slots: int, is_exact: bool, is_calm: bool) -> None:
    """is_calm: nobody leaves early and no step breaks, so that every answer is whole."""
    rng = random.Random(seed)
    blocks_max, has_blocks = rng.choice([1, 2, 4]), rng.random() < 0.5
    traffic = Traffic(FakeSession(slots, is_exact=is_exact, chunk_blocks_max=blocks_max, has_blocks=has_blocks))
    scheduler = traffic.scheduler
    beginnings = [[rng.randrange(3, 500) for _ in range(250)] for _ in range(2)]
    waiting: list[tuple[Sequence, list[int]]] = []
    for index in range(REQUESTS):
        shared = rng.choice([1, 2, 63, 64, 65, 100, 128, 129, 200])
        ids = rng.choice(beginnings)[:shared] + [rng.randrange(3, 500) for _ in range(rng.choice([0, 0, 1, 5, 30]))]
        params = SamplingParams(
            temperature=rng.choice([0.0, 1.0]), seed=index, is_seeded=True, max_tokens=rng.choice([1, 3, 25, None])
        )
        expected = alone(ids, params)
        cut = rng.choice([0, 0, len(expected) // 2])
        one = request(ids, params, expected[:cut], replays=cut > 0 and rng.random() < 0.6)
        waiting.append((one, expected))
    everyone = list(waiting)
    for _ in range(TICKS_MAX):
        if waiting and rng.random() < 0.3:
            scheduler.submit(waiting.pop(0)[0])
        chance = 1.0 if is_calm else rng.random()
        if chance < 0.02:
            submitted = everyone[: REQUESTS - len(waiting)]
            if submitted:
                scheduler.cancel(rng.choice(submitted)[0])
        elif chance < 0.03:
            traffic.session.failures = 1
        traffic.tick()
        if not waiting and not scheduler.load().active:
            break
    else:
        pytest.fail(f"not done after {TICKS_MAX} ticks")
    traffic.executor.close()
    for one, expected in everyone:
        assert one.phase is Phase.ENDED
        assert one.generated_ids == (expected if is_calm else expected[: len(one.generated_ids)])
    load = scheduler.load()
    assert (load.free_slots, load.queued, load.queued_tokens) == (slots, 0, 0)
