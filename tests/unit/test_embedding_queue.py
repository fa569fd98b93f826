"""Which inputs become one step: none lost, none twice, little padding, and nobody waits for a large request."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodes.engine.embedding_queue import LENGTH_SHARE_MIN, SHORT_TOKENS, EmbeddingQueue, EmbeddingRequest, Step
from nodes.engine.errors import QueueFull

ROWS, TOKENS = 8, 128


def request(*lengths: int, fairness_id: str = "", weight: float = 1.0) -> EmbeddingRequest:
    return EmbeddingRequest([np.zeros(length, np.int64) for length in lengths], fairness_id, weight)


def queue_of(*requests: EmbeddingRequest, limit: int = 100, rows: int = ROWS, tokens: int = TOKENS) -> EmbeddingQueue:
    queue = EmbeddingQueue(limit, rows, tokens)
    for each in requests:
        queue.submit(each)
    return queue


def steps(queue: EmbeddingQueue) -> list[Step]:
    found = []
    while (step := queue.next_step()) is not None:
        found.append(step)
    return found


lengths = st.lists(st.integers(1, 200), min_size=1, max_size=30)


@given(st.lists(st.tuples(lengths, st.sampled_from(["", "a", "b"])), min_size=1, max_size=6))
def test_every_input_is_in_exactly_one_step_within_its_bounds(drawn: list[tuple[list[int], str]]) -> None:
    requests = [request(*each, fairness_id=fairness_id) for each, fairness_id in drawn]
    queue = queue_of(*requests)
    rows = []
    for step in steps(queue):
        sizes = [len(ids) for ids in step.inputs()]
        assert len(sizes) <= ROWS
        assert len(sizes) == 1 or len(sizes) * max(sizes) <= TOKENS
        assert min(sizes) >= (0 if max(sizes) <= SHORT_TOKENS else int(max(sizes) * LENGTH_SHARE_MIN))
        assert step.tokens == sum(sizes)
        rows += step.rows
    assert len(rows) == len(set(rows)) == sum(len(each) for each, _ in drawn)
    assert (len(queue), queue.tokens) == (0, 0)


def test_requests_that_wait_share_a_step() -> None:
    requests = [request(20), request(18), request(19)]
    (step,) = steps(queue_of(*requests))
    assert step.requests == set(requests)


def test_inputs_of_very_different_lengths_do_not() -> None:
    assert [len(step.rows) for step in steps(queue_of(request(100), request(20)))] == [1, 1]


def test_a_small_request_waits_for_one_step_of_a_large_one_that_has_begun() -> None:
    large, small = request(*[100] * 500), request(30)
    queue = queue_of(large)
    queue.next_step()
    queue.submit(small)
    served = [queue.next_step() for _ in range(2)]
    assert any(step is not None and small in step.requests for step in served)


def test_a_large_request_is_served_however_many_small_ones_keep_coming() -> None:
    large = request(*[100] * 4)
    queue = queue_of(large)
    queue.submit(request(40, 40, 40))
    for _ in range(100):
        queue.submit(request(40, 40, 40))  # as much as a step takes
        queue.next_step()
    assert large.waiting == 0


def test_askers_share_in_proportion_to_their_weights_not_to_their_requests() -> None:
    many = [request(*[100] * 200, fairness_id="many") for _ in range(5)]
    heavy = request(*[100] * 200, fairness_id="heavy", weight=2.0)
    queue = queue_of(*many, heavy)
    taken = [step.rows[0][0].fairness_id for _ in range(90) if (step := queue.next_step()) is not None]
    assert 55 <= taken.count("heavy") <= 65


def test_a_full_queue_takes_nothing_and_says_how_full_it_is() -> None:
    queue = queue_of(request(5), request(100), limit=2)
    with pytest.raises(QueueFull) as raised:
        queue.submit(request(5))
    assert (raised.value.queued, raised.value.limit) == (2, 2)
    queue.next_step()
    queue.submit(request(5))


def test_a_cancelled_request_leaves_nothing_behind() -> None:
    begun, other = request(*[100] * 5), request(50)
    queue = queue_of(begun, other)
    queue.next_step()
    queue.cancel(begun)
    queue.cancel(begun)
    assert (len(queue), queue.tokens) == (1, 50)
    (step,) = steps(queue)
    assert step.requests == {other}


def test_an_input_larger_than_a_step_is_a_step() -> None:
    (step,) = steps(queue_of(request(TOKENS + 1)))
    assert step.tokens == TOKENS + 1
