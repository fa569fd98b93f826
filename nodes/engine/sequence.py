"""One generation as the engine sees it: its prompt, the tokens so far, the text they make, and when it is over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

FINISH_STOP = "stop"
FINISH_LENGTH = "length"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. temperature 0 is greedy. seed: any integer, taken modulo 2^64. max_tokens: at least 1."""

    temperature: float
    top_p: float
    seed: int
    max_tokens: int
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class EngineEvent:
    """What one step gave one sequence. text may be empty while a character or a possible stop string is incomplete.

    finish_reason and the counts are set on the last event alone. completion_tokens leaves out the end-of-sequence token.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


class TextDecoder(Protocol):
    """Turns token ids into text as they come; nodes.engine.tokenizer.TextStream is the real one."""

    def step(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        ...


class StopMatcher:
    """Passes text on until one of the stop strings occurs; what may be the beginning of one is held back."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """(text that may be shown, whether a stop string has occurred). The stop string itself is never shown."""
        if not self._stop:
            return text, False
        pending = self._held + text
        found = [index for stop in self._stop if (index := pending.find(stop)) >= 0]
        if found:
            self._held = ""
            return pending[: min(found)], True
        keep = max(_overlap(pending, stop) for stop in self._stop)
        cut = len(pending) - keep
        self._held = pending[cut:]
        return pending[:cut], False

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that begins stop."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


class Sequence:
    """Mutable state of one generation. prefilled: prompt tokens whose keys and values are in the slot.

    While it decodes, every generated token but the last one is in the slot too.
    """

    def __init__(
        self,
        prompt: tuple[int, ...],
        params: SamplingParams,
        decoder: TextDecoder,
        eos_token_ids: frozenset[int],
        deadline: float,
    ) -> None:
        self.prompt = prompt
        self.params = params
        self.deadline = deadline
        self.generated: list[int] = []
        self.prefilled = 0
        self.slot: int | None = None
        self._decoder = decoder
        self._eos_token_ids = eos_token_ids
        self._stop = StopMatcher(params.stop)

    @property
    def is_prefilled(self) -> bool:
        return self.prefilled == len(self.prompt)

    @property
    def length(self) -> int:
        """Tokens whose keys and values are in the slot."""
        return self.prefilled + max(0, len(self.generated) - 1)

    @property
    def position(self) -> int:
        """Absolute position of the token to be sampled next."""
        return len(self.prompt) + len(self.generated)

    def accept(self, token_id: int) -> EngineEvent:
        """Append a sampled token. The event's finish_reason says whether it was the last."""
        if token_id in self._eos_token_ids and not self.params.ignore_eos:
            return self._last(self._stop.flush(), (token_id,), FINISH_STOP)
        self.generated.append(token_id)
        text, is_stopped = self._stop.feed(self._decoder.step(token_id))
        if is_stopped:
            return self._last(text, (token_id,), FINISH_STOP)
        if len(self.generated) >= self.params.max_tokens:
            return self._last(text + self._stop.flush(), (token_id,), FINISH_LENGTH)
        return EngineEvent(text, (token_id,))

    def _last(self, text: str, token_ids: tuple[int, ...], reason: str) -> EngineEvent:
        return EngineEvent(text, token_ids, reason, len(self.prompt), len(self.generated))
