"""One request's state: its ids, the text they complete, and whether it has ended. Sees no slot, no clock, no session.

A sequence ends with `stop` at an end-of-sequence token or a stop string, and with `length` at max_tokens or when its
capacity is used up. An end-of-sequence token is not part of the answer: it is neither in the ids nor counted, unless
ignore_eos makes it a token like any other. The token that completes a stop string is in both, its text is not.

A sequence may begin with a part of its answer, made elsewhere before. It goes on at the next token: text decoder, stop
strings, penalties and noise stand where they would. The KV rows of that part are written in one of two ways: with the
prompt's, in chunks (fast), or one by one by the decode steps that would have made it (replay; exact in quantised
models, where a chunk's rows differ from a step's).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal, Protocol

from nodes.engine.sampling import Matcher, Sampled, SamplingParams, SamplingState, TokenLogprobs

FinishReason = Literal["stop", "length"]


@dataclass(slots=True)
class EngineEvent:
    """Tokens of one sequence and the text they complete; text may be empty. The last event has a finish_reason.

    completion_tokens: of the whole answer so far, these included. cached_tokens: prompt tokens whose KV rows were there
    already. logprobs: one for each token, where they were asked for. Not changed once made; not frozen, as Progress."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()

    def merged_with(self, later: EngineEvent) -> EngineEvent:
        """One event that says what both say. later: the one that came next."""
        return EngineEvent(
            self.text + later.text,
            self.token_ids + later.token_ids,
            later.finish_reason,
            later.prompt_tokens,
            later.completion_tokens,
            later.cached_tokens,
            self.logprobs + later.logprobs,
        )


@dataclass(slots=True)
class Progress:
    """The sequence has a token more, or has finished; not changed any more. event() is what its reader gets.

    token_id: None for an end-of-sequence token. text: None where event() makes it. Not frozen, because one is made for
    each token and freezing triples what that costs."""

    sequence: Sequence
    token_id: int | None
    finish_reason: FinishReason | None
    completion_tokens: int
    logprobs: TokenLogprobs | None
    text: str | None

    def event(self) -> EngineEvent:
        """Once for each, in the order in which they came, by one thread. Raises what the text decoder raises."""
        sequence, token_id = self.sequence, self.token_id
        text = self.text
        if text is None:
            text = "" if token_id is None else sequence.decoder.feed(token_id)
        return EngineEvent(
            text,
            () if token_id is None else (token_id,),
            self.finish_reason,
            len(sequence.prompt_ids),
            self.completion_tokens,
            min(sequence.cached_tokens, len(sequence.prompt_ids)),
            () if self.logprobs is None else (self.logprobs,),
        )


class TextDecoder(Protocol):
    """Turns ids into text one at a time."""

    def feed(self, token_id: int) -> str:
        """The characters that this id completes; "" while a character is incomplete."""
        ...

    def skip(self, token_ids: SequenceOf[int]) -> None:
        """Be where feed() would come with these, where nobody wants the text."""
        ...


class Phase(Enum):
    """Where a sequence is; the scheduler moves it."""

    WAITING = auto()
    PREFILLING = auto()
    DECODING = auto()
    ENDED = auto()


class Sequence:
    """One request from its submission to its end.

    capacity: KV rows of a slot, which hold prompt and answer; the prompt is shorter. deadline: on the engine's clock.
    generated_ids: of the answer, made before (is_resumed); replays: by decode steps. fairness_id, weight: whose request
    it is, and its share.
    text_blocks: hashes of the conversation's beginning, see prefix_digest. matcher: of the params' grammar, fresh.
    accept() must not be called after the end.

    Only a stop string makes the end depend on the text. Without one accept() leaves the text to Progress.event(), on
    another thread: then that one alone uses the decoder, else the thread of accept() alone.
    """

    __slots__ = (
        "_eos_ids",
        "_stop",
        "cached_tokens",
        "deadline",
        "decoder",
        "fairness_id",
        "generated_ids",
        "has_valid_rows",
        "is_cancelled",
        "is_resumed",
        "phase",
        "placed_at",
        "prefill_ids",
        "prefilled",
        "prompt_ids",
        "replayed",
        "sampling",
        "text_blocks",
        "token_limit",
        "weight",
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
        generated_ids: SequenceOf[int] = (),
        replays: bool = False,
        fairness_id: str = "",
        weight: float = 1.0,
        text_blocks: tuple[int, ...] = (),
        matcher: Matcher | None = None,
    ) -> None:
        count = len(prompt_ids) + len(generated_ids)
        assert 0 < len(prompt_ids) < capacity, f"{len(prompt_ids)} prompt ids, capacity {capacity}"
        assert count <= capacity, f"{count} ids, capacity {capacity}"
        self.prompt_ids = prompt_ids
        self.generated_ids: list[int] = []
        self.prefill_ids = [*prompt_ids, *(() if replays else generated_ids)]
        self.prefilled = 0  # of prefill_ids: those whose KV rows are written
        self.replayed = 0 if replays else len(generated_ids)  # of generated_ids: those that were fed, or need not be
        self.cached_tokens = 0  # of prefill_ids: those whose rows were found in a slot
        self.deadline = deadline
        self.fairness_id = fairness_id
        self.weight = weight
        self.text_blocks = text_blocks
        self.phase = Phase.WAITING
        self.placed_at = 0.0  # on the engine's clock, once it has a slot
        self.is_cancelled = False
        self.is_resumed = bool(generated_ids)
        self.has_valid_rows = True  # False once its logits were no numbers: its rows may be none either
        left = capacity - len(prompt_ids)
        self.token_limit = left if params.max_tokens is None else min(left, params.max_tokens)
        self.sampling = SamplingState(params, prompt_ids, eos_ids, matcher=matcher)
        self.decoder = decoder
        self._eos_ids = frozenset() if self.sampling.ignores_eos else eos_ids
        self._stop = StopMatcher(params.stop)
        if generated_ids:
            self._resume(generated_ids)

    @property
    def params(self) -> SamplingParams:
        return self.sampling.params

    @property
    def position(self) -> int:
        """Of the next token, counted from the prompt's first."""
        return self.sampling.position

    @property
    def forced_id(self) -> int | None:
        """What the next decode step feeds whatever the model says; None once nothing is left to replay."""
        return self.generated_ids[self.replayed] if self.replayed < len(self.generated_ids) else None

    def ended_before(self) -> EngineEvent | None:
        """The last event of an answer that was complete when it came here; None when it goes on."""
        if self._stop.is_matched:
            return self._progress(None, "stop", None, "").event()
        if len(self.generated_ids) >= self.token_limit:
            return self._progress(None, "length", None, self._stop.flush()).event()
        return None

    def accept(self, sampled: Sampled) -> Progress:
        """Take the token sampled for `position`."""
        token_id, stop = sampled.token_id, self._stop
        if token_id in self._eos_ids:
            return self._progress(None, "stop", None, stop.flush() if stop.is_needed else None)
        self.generated_ids.append(token_id)
        self.sampling.accept(token_id)
        self.replayed += 1
        finish_reason: FinishReason | None = "length" if len(self.generated_ids) >= self.token_limit else None
        if not stop.is_needed:
            return self._progress(token_id, finish_reason, sampled.logprobs, None)
        text = self.decoder.feed(token_id)
        # Text before min_tokens neither is nor begins a stop string.
        if len(self.generated_ids) > self.params.min_tokens:
            text = stop.feed(text)
        if stop.is_matched:
            finish_reason = "stop"
        elif finish_reason is not None:
            text += stop.flush()
        return self._progress(token_id, finish_reason, sampled.logprobs, text)

    def _resume(self, token_ids: SequenceOf[int]) -> None:
        """Stand where accept() would have come with these."""
        self.generated_ids += token_ids
        self.sampling.accept_all(token_ids)
        if not self._stop.is_needed:
            self.decoder.skip(token_ids)
            return
        free = min(self.params.min_tokens, len(token_ids))
        self.decoder.skip(token_ids[:free])
        self._stop.feed("".join(map(self.decoder.feed, token_ids[free:])))

    def _progress(
        self,
        token_id: int | None,
        finish_reason: FinishReason | None,
        logprobs: TokenLogprobs | None,
        text: str | None,
    ) -> Progress:
        return Progress(self, token_id, finish_reason, len(self.generated_ids), logprobs, text)


class StopMatcher:
    """Passes text through up to the first stop string; text that could begin one is held back until that is decided.

    First is the one that completes first, then the longer one: so how the text is cut does not change the result.
    Held back is always less than the longest stop string. is_needed: there is a stop string.
    """

    __slots__ = ("_held", "_stops", "is_matched", "is_needed")

    def __init__(self, stops: SequenceOf[str]) -> None:
        assert all(stops), "an empty stop string"
        self.is_needed = bool(stops)
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
