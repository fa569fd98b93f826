"""How a request wants its tokens chosen, and what the choice of one sequence's next token depends on beside its logits.

Data and its bookkeeping only; nodes.engine.sampler chooses.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

TOP_LOGPROBS_MAX = 20  # as OpenAI's API


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
    how many of the likeliest tokens to tell beside the chosen one, at most TOP_LOGPROBS_MAX.
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


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the probabilities that the model itself gave, before bias, penalties and temperature.

    top: (token id, logprob) of the likeliest, the likeliest first; as many as were asked for."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Sampled:
    """One chosen token; logprobs where they were asked for. token_id is sampler.INVALID where the logits are none."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class SamplingState:
    """Params and position of one sequence, and what its earlier tokens mean for the next."""

    __slots__ = ("_prompt_tokens", "generated", "params")

    def __init__(self, params: SamplingParams, prompt_ids: SequenceOf[int], eos_ids: frozenset[int]) -> None:
        """eos_ids: all of the model's, whatever params.ignore_eos says."""
        self.params = params
        self.generated = 0
        self._prompt_tokens = len(prompt_ids)

    @property
    def position(self) -> int:
        """Of the next token, counted from the prompt's first. It keys the sampling noise, so a sequence that is
        resumed elsewhere after some of its tokens draws the same noise."""
        return self._prompt_tokens + self.generated

    def accept(self, token_id: int) -> None:
        """The sequence's next token is this one."""
        self.generated += 1
