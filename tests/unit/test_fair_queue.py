"""Who is served next: in order of arrival, and nobody kept waiting by one who asks much."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodes.engine import fair_queue
from nodes.engine.fair_queue import FairQueue
from nodes.engine.sampling import SamplingParams
from nodes.engine.sequence import Sequence
from tests.unit.test_sequence import LetterDecoder

FAR = 1e9


def sequence(asker: str = "", deadline: float = FAR, generated_ids: tuple[int, ...] = ()) -> Sequence:
    return Sequence(
        [1],
        SamplingParams(),
        LetterDecoder(),
        eos_ids=frozenset(),
        capacity=8,
        deadline=deadline,
        generated_ids=generated_ids,
        fairness_id=asker,
    )


def served(queue: FairQueue, prompt_tokens: int = 10) -> list[str]:
    """Askers in the order in which they are served, each charged for its prompt."""
    order = []
    while queue:
        order.append(queue.pop().fairness_id)
        queue.charge(order[-1], prompt_tokens=prompt_tokens)
    return order


def test_one_asker_is_served_in_order_of_arrival() -> None:
    queue = FairQueue()
    sequences = [sequence() for _ in range(5)]
    for one in sequences:
        queue.push(one)
    assert list(queue) == sequences
    assert [queue.pop() for _ in sequences] == sequences
    assert len(queue) == 0


def test_what_another_engine_has_begun_goes_first_in_order_of_arrival() -> None:
    queue = FairQueue()
    new, first, second, third = sequence("b"), *(sequence("a", generated_ids=(2,)) for _ in range(3))
    for one in (new, first, second, third):
        queue.push(one)
    assert list(queue) == [first, second, third, new]
    queue.remove(second)
    assert [queue.pop() for _ in range(len(queue))] == [first, third, new]


def test_what_another_engine_has_begun_is_never_displaced_and_expires_like_the_others() -> None:
    queue = FairQueue()
    resumed = [sequence("a", deadline=5.0, generated_ids=(2,)) for _ in range(9)]
    for one in resumed:
        queue.push(one)
    assert queue.displace_for("b") is None
    assert queue.pop_expired(5.0) == resumed
    assert len(queue) == 0


@pytest.mark.parametrize(
    ("arrivals", "order"),
    [("aaab", "abaa"), ("aabb", "abab"), ("abc", "abc"), ("aaabbc", "abcaba")],
)
def test_askers_take_turns(arrivals: str, order: str) -> None:
    queue = FairQueue()
    for asker in arrivals:
        queue.push(sequence(asker))
    assert "".join(served(queue)) == order


def test_who_generates_much_waits_longer_for_the_next() -> None:
    queue = FairQueue()
    for asker in "aabb":
        queue.push(sequence(asker))
    assert queue.pop().fairness_id == "a"
    queue.charge("a", prompt_tokens=10, generated_tokens=100)
    assert served(queue) == ["b", "b", "a"]


def test_who_asked_for_nothing_brings_no_credit() -> None:
    queue = FairQueue()
    for _ in range(100):
        queue.push(sequence("busy"))
        served(queue)
    for asker in ("new", "new", "new", "busy", "busy"):
        queue.push(sequence(asker))
    assert served(queue) == ["new", "new", "busy", "new", "busy"]


def test_the_late_are_taken_out_and_the_others_stay() -> None:
    queue = FairQueue()
    early, late = sequence("a", 5.0), sequence("b", 7.0)
    for one in (late, early, sequence("a")):
        queue.push(one)
    assert queue.pop_expired(4.9) == []
    assert queue.pop_expired(5.0) == [early]
    assert queue.pop_expired(9.0) == [late]
    assert queue.pop_expired(FAR - 1) == []
    assert len(queue) == 1


@pytest.mark.parametrize(
    ("waiting", "asker", "displaced"),
    [
        ("aaaa", "b", 3),
        ("aaba", "b", 3),
        ("aaab", "b", 2),
        ("aaabb", "b", None),
        ("aaab", "c", 2),
        ("aabb", "c", 1),
        ("abcd", "e", None),
        ("aaaa", "a", None),
        ("aaaaab", "b", 4),
        ("baaaab", "b", 4),
        ("", "a", None),
    ],
)
def test_who_holds_most_places_gives_its_newest_where_that_makes_them_more_even(
    waiting: str, asker: str, displaced: int | None
) -> None:
    queue = FairQueue()
    sequences = [sequence(name) for name in waiting]
    for one in sequences:
        queue.push(one)
    found = queue.displace_for(asker)
    assert found is (None if displaced is None else sequences[displaced])
    assert list(map(id, sorted(queue, key=sequences.index))) == [id(one) for one in sequences if one is not found]
    assert len(queue) == len(waiting) - (found is not None)


def test_askers_that_are_gone_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_queue, "ASKERS_MAX", 10)
    queue = FairQueue()
    for number in range(50):
        queue.push(sequence(str(number)))
        served(queue)
    assert len(queue._service) <= 11


def test_who_never_was_served_is_forgotten_when_it_leaves() -> None:
    queue = FairQueue()
    for number in range(50):
        one = sequence(str(number))
        queue.push(one)
        queue.remove(one)
    assert not queue._service


@given(st.lists(st.one_of(st.sampled_from("abc"), st.sampled_from([1, 5, 30, "pop", "remove"])), max_size=60))
def test_nothing_is_lost_or_served_twice(steps: list[str | int]) -> None:
    queue, waiting, asker = FairQueue(), [], "a"
    for step in steps:
        if isinstance(step, int):
            queue.charge(asker, generated_tokens=step)
        elif step == "pop" and waiting:
            one = queue.pop()
            assert all(one.fairness_id != other.fairness_id or other is one for other in waiting[: waiting.index(one)])
            waiting.remove(one)
        elif step == "remove" and waiting:
            queue.remove(waiting.pop(len(waiting) // 2))
        elif step in ("a", "b", "c"):
            asker = step
            waiting.append(sequence(step))
            queue.push(waiting[-1])
        assert set(map(id, queue)) == set(map(id, waiting))
        assert len(queue) == len(waiting)
