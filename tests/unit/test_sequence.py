"""A sequence by itself: what each token gives its reader, and when it ends."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodes.engine.sampling import Sampled, SamplingParams
from nodes.engine.sequence import EngineEvent, Sequence, StopMatcher

EOS = 1
CAPACITY = 12
PROMPT = [5, 6, 7, 8]


class LetterDecoder:
    """id n is the n-th letter."""

    def feed(self, token_id: int) -> str:
        return chr(ord("a") + token_id)

    def skip(self, token_ids: Iterable[int]) -> None:
        """Nothing to remember."""


def sequence(**params: object) -> Sequence:
    return Sequence(
        PROMPT,
        SamplingParams(**params),  # type: ignore[arg-type]
        LetterDecoder(),
        eos_ids=frozenset({EOS}),
        capacity=CAPACITY,
        deadline=0.0,
    )


def feed(target: Sequence, text: str) -> list[EngineEvent]:
    """Feed letters until one of them ends the sequence."""
    events = []
    for letter in text:
        events.append(target.accept(Sampled(ord(letter) - ord("a"))).event())
        if events[-1].finish_reason is not None:
            break
    return events


@pytest.mark.parametrize(
    ("params", "tokens", "text", "ids", "finish_reason"),
    [
        ({}, "cdb", "cd", 2, "stop"),
        ({"ignore_eos": True}, "cdb", "cdb", 3, None),
        ({"max_tokens": 3}, "cdefg", "cde", 3, "length"),
        ({"max_tokens": 100}, "cdefghijklm", "cdefghij", 8, "length"),
        ({"max_tokens": 3}, "cdb", "cd", 2, "stop"),
        ({"stop": ("ef",)}, "cdefg", "cd", 4, "stop"),
        ({"stop": ("ef",)}, "cdegh", "cdegh", 5, None),
        ({"stop": ("efx",), "max_tokens": 4}, "cdef", "cdef", 4, "length"),
        ({"stop": ("efx",)}, "cdefb", "cdef", 4, "stop"),
        ({"stop": ("ef",), "max_tokens": 4}, "cdef", "cd", 4, "stop"),
    ],
    ids=[
        "end of sequence",
        "ignored end of sequence",
        "max_tokens",
        "capacity",
        "end of sequence at max_tokens",
        "stop string",
        "no stop string after all",
        "held text at max_tokens",
        "held text at end of sequence",
        "stop string at max_tokens",
    ],
)
def test_a_sequence_ends_for_the_right_reason_with_the_right_text(
    params: dict[str, object], tokens: str, text: str, ids: int, finish_reason: str | None
) -> None:
    events = feed(sequence(**params), tokens)
    assert "".join(event.text for event in events) == text
    assert sum(len(event.token_ids) for event in events) == ids
    assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + [finish_reason]
    assert (events[-1].prompt_tokens, events[-1].completion_tokens) == (len(PROMPT), ids)


def test_positions_count_on_from_the_prompt() -> None:
    one = sequence()
    assert one.position == len(PROMPT)
    feed(one, "cde")
    assert one.position == len(PROMPT) + 3


def test_merged_events_say_what_both_say() -> None:
    one = sequence(max_tokens=2)
    first, last = feed(one, "cd")
    assert first.merged_with(last) == EngineEvent("cd", (2, 3), "length", len(PROMPT), 2)


def matched(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, bool]:
    """Text passed and whether a stop string ended it, fed piece by piece."""
    matcher = StopMatcher(stops)
    passed = ""
    for piece in pieces:
        passed += matcher.feed(piece)
        if matcher.is_matched:
            return passed, True
    return passed + matcher.flush(), False


SMALL_TEXT = st.text(alphabet="ab", min_size=1, max_size=4)
STOPS = st.lists(SMALL_TEXT, max_size=3).map(tuple)


@given(stops=STOPS, pieces=st.lists(SMALL_TEXT, max_size=12))
def test_stop_strings_are_found_however_the_text_is_cut(stops: tuple[str, ...], pieces: list[str]) -> None:
    text = "".join(pieces)
    assert matched(stops, pieces) == matched(stops, list(text)) == matched(stops, [text])


@given(stops=STOPS, text=st.text(alphabet="ab", max_size=30))
def test_text_passes_exactly_up_to_the_first_stop_string(stops: tuple[str, ...], text: str) -> None:
    passed, is_matched = matched(stops, list(text))
    assert is_matched == any(stop in text for stop in stops)
    assert text.startswith(passed)
    assert not any(stop in passed for stop in stops)
    if is_matched:
        assert any(text[len(passed) :].startswith(stop) for stop in stops)
    else:
        assert passed == text


@given(stops=st.lists(SMALL_TEXT, min_size=1, max_size=3).map(tuple), pieces=st.lists(SMALL_TEXT, max_size=12))
def test_less_is_held_back_than_the_longest_stop_string(stops: tuple[str, ...], pieces: list[str]) -> None:
    matcher = StopMatcher(stops)
    fed = passed = 0
    for piece in pieces:
        fed += len(piece)
        passed += len(matcher.feed(piece))
        if matcher.is_matched:
            break
        assert fed - passed < max(map(len, stops))
