"""Requests whose right answers are known: made from a seed and asked of one undisturbed node before all else."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import trio

from deploy.models.demo.tokenizer import END_ID
from tests.cluster.stream_client import Answer, ask

# In this order over and over: mostly what has but ids and a seed, among it what carries more across nodes.
PLAIN = ("greedy", "seeded", "greedy", "seeded")
# Goes on beyond the end of its answer, in a run of tokens that have no text: no measure of pauses.
ENDLESS = "endless"
KINDS: tuple[str, ...] = tuple(
    kind for special in ("stop", "n2", "logprobs", "penalties", "json_object", ENDLESS) for kind in (*PLAIN, special)
)
QUESTIONS = (
    "What happens when a node dies?",
    "How do I add a node?",
    "Is there a master?",
    "Which metrics does a node export?",
    "How do I drain a node before maintenance?",
    "Where are the logs?",
)
REFERENCE_CONCURRENCY = 8
STOP_CHARS = 7
STOP_TRIES = 50
# The tokens of two runs are equal; their probabilities differ by the order in which sums were taken.
LOGPROB_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Case:
    index: int
    kind: str
    body: dict[str, Any]


@dataclass(slots=True)
class Workload:
    """cases: in the order in which they are to be asked. right: by the index of the case. not_served: kinds that the
    API of this version refuses; no case is of one."""

    cases: list[Case] = field(default_factory=list)
    right: dict[int, Answer] = field(default_factory=dict)
    not_served: list[str] = field(default_factory=list)


async def prepare(address: str, count: int, seed: int, tokens: tuple[int, int]) -> Workload:
    """`count` cases and their right answers, from the node at HOST:PORT. tokens: least and most of an answer.

    Raises AssertionError for an answer that did not end as it should: then nothing can be compared.
    """
    rng = random.Random(seed)
    refused = [kind for kind in dict.fromkeys(KINDS) if not await _is_served(address, kind)]
    kinds = _served_kinds(refused)
    drafts = [Case(index, kind := next(kinds), _body(kind, index, rng, tokens)) for index in range(count)]
    whole = await _ask_all(address, [case for case in drafts if case.kind == "stop"])
    cases = [_with_stop(case, whole[case.index], rng) if case.kind == "stop" else case for case in drafts]
    return Workload(cases, await _ask_all(address, cases), refused)


def difference(answer: Answer, right: Answer) -> str | None:
    """What a whole answer has otherwise than it should; None where nothing."""
    if answer.ending != "done":
        return answer.error
    if sorted(answer.choices) != sorted(right.choices):
        return f"choices {sorted(answer.choices)} instead of {sorted(right.choices)}"
    for index, expected in right.choices.items():
        choice = answer.choices[index]
        if choice.text != expected.text:
            return f"choice {index}: {_text_difference(choice.text, expected.text)}"
        if choice.finish_reason != expected.finish_reason:
            return f"choice {index}: finish_reason {choice.finish_reason} instead of {expected.finish_reason}"
        if len(choice.logprobs) != len(expected.logprobs):
            return f"choice {index}: {len(choice.logprobs)} logprobs instead of {len(expected.logprobs)}"
        for place, (got, wanted) in enumerate(zip(choice.logprobs, expected.logprobs, strict=True)):
            if got[0] != wanted[0] or abs(got[1] - wanted[1]) > LOGPROB_TOLERANCE:
                return f"choice {index}: logprob {place} is {got} instead of {wanted}"
    if _counts(answer) != _counts(right):
        return f"usage {_counts(answer)} instead of {_counts(right)}"
    return None


def prefix_difference(answer: Answer, right: Answer) -> str | None:
    """What a broken answer had shown that is no beginning of the right one; None where nothing."""
    for index, choice in answer.choices.items():
        expected = right.choices.get(index)
        if expected is None:
            return f"choice {index} was not asked for"
        if not expected.text.startswith(choice.text):
            return f"choice {index} is no prefix: {_text_difference(choice.text, expected.text)}"
    return None


def _text_difference(got: str, wanted: str) -> str:
    place = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted)))
    shown = slice(max(0, place - 30), place + 30)
    return f"at {place} of {len(got)} characters (right: {len(wanted)}): {got[shown]!r} instead of {wanted[shown]!r}"


def _counts(answer: Answer) -> tuple[int, int] | None:
    usage = answer.usage
    return None if usage is None else (usage["prompt_tokens"], usage["completion_tokens"])


def _served_kinds(refused: Iterable[str]) -> Iterator[str]:
    without = set(refused)
    while True:
        yield from (kind for kind in KINDS if kind not in without)


def _body(kind: str, index: int, rng: random.Random, tokens: tuple[int, int]) -> dict[str, Any]:
    """The token that ends an answer has no text: a run of them would look like a pause. So it is drawn only where that
    is what is asked for."""
    body: dict[str, Any] = {
        "model": "demo",
        "messages": [{"role": "user", "content": rng.choice(QUESTIONS)}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "max_tokens": rng.randint(*tokens),
    }
    # Hot enough that the text does not end in a repetition, in which a lost token would not show.
    sampled = {"temperature": round(rng.uniform(1.2, 1.9), 2), "seed": index + 1}
    body |= {"temperature": 0} if kind in ("greedy", "json_object", ENDLESS) else sampled
    if kind not in ("json_object", ENDLESS):
        body["logit_bias"] = {str(END_ID): -100}
    extra: dict[str, dict[str, Any]] = {
        "n2": {"n": 2},
        "logprobs": {"logprobs": True, "top_logprobs": 2},
        "penalties": {"frequency_penalty": 0.6, "presence_penalty": 0.4},
        "json_object": {"response_format": {"type": "json_object"}, "ignore_eos": False},
    }
    return body | extra.get(kind, {})


async def _is_served(address: str, kind: str) -> bool:
    body = _body(kind, 0, random.Random(0), (1, 1))
    answer = await ask(address, body)
    return not (answer.status == 400 and json.loads(answer.body)["error"]["code"] == "unsupported_parameter")


def _with_stop(case: Case, whole: Answer, rng: random.Random) -> Case:
    """A stop string that ends the answer in its second half where there is one."""
    text = whole.choices[0].text
    stop = "no such text"
    for _ in range(STOP_TRIES):
        start = rng.randrange(len(text) // 2, max(len(text) // 2 + 1, len(text) - STOP_CHARS))
        piece = text[start : start + STOP_CHARS]
        if piece.strip() and text.find(piece) >= len(text) // 2:
            stop = piece
            break
    return replace(case, body=case.body | {"stop": [stop]})


async def _ask_all(address: str, cases: Iterable[Case]) -> dict[int, Answer]:
    answers: dict[int, Answer] = {}
    limit = trio.CapacityLimiter(REFERENCE_CONCURRENCY)

    async def one(case: Case) -> None:
        async with limit:
            answers[case.index] = answer = await ask(address, case.body)
        assert answer.ending == "done", f"the undisturbed {case.kind} answer {case.index}: {answer.error}"

    async with trio.open_nursery() as nursery:
        for case in cases:
            nursery.start_soon(one, case)
    return answers
