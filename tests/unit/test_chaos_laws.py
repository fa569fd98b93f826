"""What the chaos programs compare answers with notices every way in which one may be wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cluster.disturber import Harm
from tests.cluster.stream_client import Answer, Ending, Frame
from tests.cluster.workload import difference, prefix_difference

RIGHT = ("Kill ", "any ", "node, ", "any ", "time.")


def answer(*texts: str, ending: Ending = "done", finish: str | None = "length", tokens: int = 5) -> Answer:
    made = Answer(0.0, status=200, ending=ending)
    for at, text in enumerate(texts):
        add(made, at, {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]})
    if finish is not None:
        add(made, len(texts), {"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    if ending == "done":
        usage = {"prompt_tokens": 3, "completion_tokens": tokens}
        add(made, len(texts), {"choices": [], "usage": usage})
        made.frames.append(Frame(float(len(texts)), b"[DONE]"))
    return made


def add(made: Answer, at: float, chunk: dict[str, Any]) -> None:
    made.frames.append(Frame(float(at), json.dumps(chunk).encode()))


def test_an_equal_answer_has_no_difference_however_it_was_cut_into_frames() -> None:
    assert difference(answer(*RIGHT), answer(*RIGHT)) is None
    assert difference(answer("".join(RIGHT)), answer(*RIGHT)) is None


@pytest.mark.parametrize(
    "wrong",
    [
        answer(*RIGHT[:1], *RIGHT[2:]),
        answer(*RIGHT[:2], *RIGHT[1:]),
        answer(*RIGHT[:2], "link, ", *RIGHT[3:]),
        answer(*RIGHT[:-1]),
        answer(*RIGHT, " "),
        answer(*RIGHT, finish="stop"),
        answer(*RIGHT, tokens=6),
        answer(*RIGHT, ending="cut"),
        answer(*RIGHT, ending="error"),
        answer(),
    ],
    ids=["lost", "doubled", "changed", "short", "long", "finish_reason", "usage", "cut", "error", "empty"],
)
def test_a_wrong_answer_is_noticed(wrong: Answer) -> None:
    assert difference(wrong, answer(*RIGHT)) is not None


def test_what_a_broken_answer_showed_has_to_be_a_beginning_of_the_right_one() -> None:
    right = answer(*RIGHT)
    for count in range(len(RIGHT) + 1):
        assert prefix_difference(answer(*RIGHT[:count], ending="cut", finish=None), right) is None
    assert prefix_difference(answer("Kill ", "node", ending="cut", finish=None), right) is not None
    assert prefix_difference(answer(*RIGHT, "more", ending="cut", finish=None), right) is not None


@pytest.mark.parametrize(
    ("start", "end", "touches"),
    [(0.0, 0.9, False), (0.0, 1.0, True), (1.5, 1.6, True), (0.0, 9.0, True), (2.0, 3.0, True), (2.1, 3.0, False)],
)
def test_a_harm_touches_the_streams_that_ran_meanwhile(start: float, end: float, touches: bool) -> None:
    assert Harm("node-1", "stop", 1.0, over_at=2.0).touches(start, end) is touches


def test_a_harm_that_lasts_touches_all_later_streams() -> None:
    assert Harm("node-1", "kill", 1.0).touches(100.0, 101.0)
