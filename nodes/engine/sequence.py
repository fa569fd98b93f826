"""One request's state: its ids, the text they complete, and whether it has ended. Sees no slot, no clock, no session.

A sequence ends with `stop` at an end-of-sequence token or a stop string, and with `length` at max_tokens or when its
capacity is used up. An end-of-sequence token is not part of the answer: it is neither in the ids nor counted, unless
ignore_eos makes it a token like any other. The token that completes a stop string is in both, its text is not.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    temperature: 0 is greedy. top_p: in [0, 1], 1 keeps all. seed: any integer, of which the lowest 64 bits count.
    max_tokens: at least 1; None means what is left of the capacity. stop: no string in it is empty.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class EngineEvent:
    """Tokens of one sequence and the text they complete; text may be empty. The last event has a finish_reason.

    completion_tokens: generated so far, these included."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int

    def merged_with(self, later: EngineEvent) -> EngineEvent:
        """One event that says what both say. later: the one that came next."""
        return EngineEvent(
            self.text + later.text,
            self.token_ids + later.token_ids,
            later.finish_reason,
            later.prompt_tokens,
            later.completion_tokens,
        )


class TextDecoder(Protocol):
    """Turns ids into text one at a time."""

    def feed(self, token_id: int) -> str:
        """The characters that this id completes; "" while a character is incomplete."""
        ...


class Phase(Enum):
    """Where a sequence is; the scheduler moves it."""

    WAITING = auto()
    PREFILLING = auto()
    DECODING = auto()
    ENDED = auto()


class Sequence:
    """One request from its submission to its end.

    capacity: KV rows of a slot, which hold prompt and answer; len(prompt_ids) < capacity. deadline: on the engine's
    clock. After the end, accept() must not be called.
    """

    __slots__ = (
        "_decoder",
        "_eos_ids",
        "_stop",
        "deadline",
        "generated_ids",
        "is_cancelled",
        "params",
        "phase",
        "prefilled",
        "prompt_ids",
        "token_limit",
    )

    def __init__(
        self,
        prompt_ids: SequenceOf[int],
        params: SamplingParams,
        decoder: TextDecoder,
        *,
        eos_ids: frozenset[int],
        capacity: int,
        deadline: float,
    ) -> None:
        assert 0 < len(prompt_ids) < capacity, f"{len(prompt_ids)} prompt ids, capacity {capacity}"
        self.prompt_ids = prompt_ids
        self.params = params
        self.deadline = deadline
        self.generated_ids: list[int] = []
        self.prefilled = 0  # prompt ids whose KV rows are written
        self.phase = Phase.WAITING
        self.is_cancelled = False
        left = capacity - len(prompt_ids)
        self.token_limit = left if params.max_tokens is None else min(left, params.max_tokens)
        self._decoder = decoder
        self._eos_ids = frozenset() if params.ignore_eos else eos_ids
        self._stop = StopMatcher(params.stop)

    @property
    def position(self) -> int:
        """Of the next token, counted from the prompt's first. It keys the sampling noise, so a sequence that is
        resumed elsewhere with prompt and answer so far as its prompt draws the same noise."""
        return len(self.prompt_ids) + len(self.generated_ids)

    def accept(self, token_id: int) -> EngineEvent:
        """Take the token sampled for `position`. The event that its reader gets."""
        if token_id in self._eos_ids:
            return self._event(self._stop.flush(), (), "stop")
        self.generated_ids.append(token_id)
        text = self._stop.feed(self._decoder.feed(token_id))
        if self._stop.is_matched:
            return self._event(text, (token_id,), "stop")
        if len(self.generated_ids) >= self.token_limit:
            return self._event(text + self._stop.flush(), (token_id,), "length")
        return self._event(text, (token_id,), None)

    def _event(self, text: str, token_ids: tuple[int, ...], finish_reason: FinishReason | None) -> EngineEvent:
        return EngineEvent(text, token_ids, finish_reason, len(self.prompt_ids), len(self.generated_ids))


class StopMatcher:
    """Passes text through up to the first stop string; text that could begin one is held back until that is decided.

    First is the one that completes first, then the longer one: so how the text is cut does not change the result.
    Held back is always less than the longest stop string.
    """

    __slots__ = ("_held", "_stops", "is_matched")

    def __init__(self, stops: SequenceOf[str]) -> None:
        assert all(stops), "an empty stop string"
        self._stops = tuple(stops)
        self._held = ""
        self.is_matched = False

    def feed(self, text: str) -> str:
        """The text that is now certain to lie before any stop string. Nothing follows once is_matched."""
        if not self._stops or not text:
            return text
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.is_matched = True
            self._held = ""
            return text[: min(found)[1]]
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back and, since the text has ended, begins no stop string."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
