"""The decoders under arbitrary and mutated input, a moment of it; `make fuzz` feeds a million."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import datagrams, links
from tests.fuzz.__main__ import SUBJECTS, run
from tests.fuzz.datagrams import DatagramSubject
from tests.fuzz.links import LinkSubject
from tests.fuzz.mutate import Mutator
from tests.fuzz.sections import SectionSubject
from tests.fuzz.subjects import Subject

MUTATIONS_AN_EXAMPLE = 20

subjects = pytest.mark.parametrize("kind", SUBJECTS.values(), ids=SUBJECTS.keys())


@subjects
@given(st.lists(st.binary(max_size=200), max_size=5))
@settings(max_examples=50)
def test_arbitrary_input_raises_nothing_and_what_is_rejected_changes_nothing(
    kind: type[Subject], inputs: list[bytes]
) -> None:
    subject = kind()
    for data in inputs:
        subject.feed(data)


@subjects
@given(st.integers(0, 2**32))
@settings(max_examples=25)
def test_mutated_input_raises_nothing_and_what_is_rejected_changes_nothing(kind: type[Subject], seed: int) -> None:
    subject = kind()
    mutator = Mutator(subject.seeds(), random.Random(seed))
    for _ in range(MUTATIONS_AN_EXAMPLE):
        subject.feed(mutator.draw())


@subjects
def test_every_starting_point_of_mutation_is_taken_without_a_fault(kind: type[Subject]) -> None:
    subject = kind()
    for seed in subject.seeds():
        subject.feed(seed)
    assert any(outcome.startswith("accepted") for outcome in subject.outcomes)


@pytest.mark.parametrize(
    ("kind", "reasons"),
    [
        pytest.param(DatagramSubject, datagrams.REASONS, id="datagram"),
        pytest.param(LinkSubject, links.REASONS - {"fenced", "protocol version", "unspecified"}, id="link"),
        pytest.param(SectionSubject, {"malformed"}, id="section"),
    ],
)
def test_a_few_thousand_mutations_meet_every_reason_of_rejection(kind: type[Subject], reasons: set[str]) -> None:
    subject = kind()
    assert run(subject, 4_000, seed=7)
    assert reasons <= subject.outcomes.keys()


def test_the_same_seed_draws_the_same_inputs() -> None:
    one, two = (Mutator(DatagramSubject().seeds(), random.Random(3)) for _ in range(2))
    assert [one.draw() for _ in range(500)] == [two.draw() for _ in range(500)]


class Faulty:
    """A decoder that lets out an error for long input."""

    name = "faulty"

    def __init__(self) -> None:
        self.outcomes = SectionSubject().outcomes

    def seeds(self) -> list[bytes]:
        return [b"\x00seed"]

    def feed(self, data: bytes) -> None:
        if len(data) > 30:
            raise IndexError("beyond the end")


def test_a_fault_ends_the_run_and_prints_the_input_that_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert not run(Faulty(), 10_000, seed=7)
    told = capsys.readouterr().err
    assert "IndexError: beyond the end" in told
    assert "python -m tests.fuzz --subject faulty --hex " in told
