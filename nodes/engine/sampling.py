"""How a request wants its tokens chosen, and what the choice of one sequence's next token depends on beside its logits.

Data and its bookkeeping only; nodes.engine.sampler chooses.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from nodes.engine.penalties import LogitBias, Penalties

TOP_LOGPROBS_MAX = 20  # as OpenAI's API
TEMPERATURE_MIN = 1e-5  # below it sampling is greedy: float32 logits are not finer than that

GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "grammar"]


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """What an answer must look like.

    text: of json_object nothing; of json_schema the schema; of regex an expression that matches the whole answer, as
    Rust's regex crate writes it, without look-around; of choice a JSON list of strings; of grammar a Lark grammar as
    llguidance writes it, which begins at `start`."""

    kind: GrammarKind
    text: str = ""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    temperature: 0 is greedy. top_p: in [0, 1], 1 keeps all. top_k: 0 keeps all. min_p: in [0, 1], 0 keeps all.
    presence_penalty, frequency_penalty: subtracted for tokens of the answer so far, 0 does nothing.
    repetition_penalty: divides positive and multiplies negative logits of tokens of prompt and answer, 1 does nothing.
    logit_bias: (token id, what is added to its logit). seed: any integer, of which the lowest 64 bits count; is_seeded:
    the client gave it, and expects the same answer again. choice: which of several answers to one prompt this is; each
    draws its own noise. max_tokens: at least 1; None means what is left of the capacity. min_tokens: no
    end-of-sequence token and no stop string ends the answer before. stop: no string in it is empty. logprobs: None, or
    how many of the likeliest tokens to tell beside the chosen one, at most TOP_LOGPROBS_MAX. grammar: what the answer
    must look like; it ends where that is complete, even with ignore_eos or before min_tokens.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    is_seeded: bool = False
    choice: int = 0
    min_tokens: int = 0
    logprobs: int | None = None
    grammar: GrammarSpec | None = None

    @property
    def is_reproducible(self) -> bool:
        """The same request is to give the same answer again: it is greedy, or its client gave a seed."""
        return self.is_seeded or self.temperature < TEMPERATURE_MIN


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the probabilities that the model itself gave, before bias, penalties and temperature.

    top: (token id, logprob) of the likeliest, the likeliest first; as many as were asked for."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Sampled:
    """One chosen token; logprobs where they were asked for. token_id is sampler.INVALID where the logits are none.

    Not changed once made; not frozen, because one is made for each token and freezing triples what that costs."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class Matcher(Protocol):
    """What a grammar leaves open for one sequence's next token; nodes.engine.grammar.GrammarMatcher has the details."""

    @property
    def error(self) -> str | None: ...
    @property
    def must_end(self) -> bool: ...

    def accept(self, token_id: int) -> None: ...

    def prepare(self) -> None: ...

    def forbid(self, row: npt.NDArray[np.float32]) -> None: ...


class SamplingState:
    """Params and position of one sequence, and what its earlier tokens mean for the next.

    end_ids: int64, those that end the answer. changes_logits: params or grammar ask for other logits than the model's.
    draws: its tokens are drawn, not the likeliest.
    """

    __slots__ = (
        "_prompt_tokens",
        "bias",
        "changes_logits",
        "draws",
        "end_ids",
        "generated",
        "matcher",
        "params",
        "penalties",
    )

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: SequenceOf[int],
        eos_ids: frozenset[int],
        *,
        matcher: Matcher | None = None,
    ) -> None:
        """eos_ids: all of the model's, whatever params.ignore_eos says. matcher: of params.grammar, for this sequence
        alone, and fresh."""
        assert params.grammar is None or matcher is not None, "a grammar without its matcher"
        self.params = params
        self.draws = params.temperature >= TEMPERATURE_MIN
        self.matcher = matcher
        self.generated = 0
        self.end_ids = np.array([] if self.ignores_eos else sorted(eos_ids), np.int64)
        self.bias = LogitBias(params.logit_bias) if params.logit_bias else None
        self.penalties: Penalties | None = None
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0:
            self.penalties = Penalties(
                params.presence_penalty, params.frequency_penalty, params.repetition_penalty, prompt_ids
            )
        self.changes_logits = bool(self.bias or self.penalties or matcher or params.min_tokens)
        self._prompt_tokens = len(prompt_ids)

    @property
    def position(self) -> int:
        """Of the next token, counted from the prompt's first. It keys the sampling noise, so a sequence that is
        resumed elsewhere after some of its tokens draws the same noise."""
        return self._prompt_tokens + self.generated

    @property
    def ignores_eos(self) -> bool:
        """An end-of-sequence token is a token like any other. Never so with a grammar, which knows its end."""
        return self.params.ignore_eos and self.matcher is None

    @property
    def error(self) -> str | None:
        """Why no further token can be chosen, in one line; None where that is not known."""
        return None if self.matcher is None else self.matcher.error

    def accept(self, token_id: int) -> None:
        """The answer's next token is this one."""
        self.generated += 1
        if self.penalties is not None:
            self.penalties.count(token_id)
        if self.matcher is not None:
            self.matcher.accept(token_id)

    def accept_all(self, token_ids: SequenceOf[int]) -> None:
        """What accept() does for one after the other."""
        if self.penalties is None and self.matcher is None:
            self.generated += len(token_ids)
        else:
            for token_id in token_ids:
                self.accept(token_id)
