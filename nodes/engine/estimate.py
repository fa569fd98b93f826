"""Estimates the time to first token of a request that would come now. Pure arithmetic over what was measured.

    slot     none while a slot is free. Else the sequences in slots are expected to end one after the other; the request
             gets the slot that the one before it in the queue leaves free.
    ahead    the prompt tokens that are prefilled before its own, which goes on while it waits for the slot.
    own      its own prompt.

The engine prefills one block a tick beside the decode step of all others, so a prompt token costs its share of a block
and of that step.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from nodes.engine.kv_slots import BLOCK_TOKENS

# Until they are measured: a small model on two cores.
PREFILL_RATE_DEFAULT = 500.0
STEP_S_DEFAULT = 0.01


@dataclass(frozen=True, slots=True)
class FirstTokenEstimate:
    """first token after wait_s + prompt tokens x prompt_token_s."""

    wait_s: float
    prompt_token_s: float

    def seconds(self, prompt_tokens: int) -> float:
        return self.wait_s + prompt_tokens * self.prompt_token_s


def estimate_first_token(
    *,
    prefill_rate: float,
    step_s: float,
    answer_tokens: float,
    slots: int,
    queued: int,
    queued_tokens: int,
    remaining_tokens: SequenceOf[float],
) -> FirstTokenEstimate:
    """prefill_rate: tokens/s of chunks alone. step_s: of a decode step of the batch there is. 0.0 while unmeasured.
    answer_tokens: expected of an answer. remaining_tokens: of each sequence in a slot."""
    rate = prefill_rate or PREFILL_RATE_DEFAULT
    step = step_s or STEP_S_DEFAULT
    busy = len(remaining_tokens)
    placeable = min(queued, slots - busy)  # they find a slot free, and hold it for a whole answer
    taken = sorted([*remaining_tokens, *[answer_tokens] * placeable])
    prompt_token_s = 1 / rate + (step / BLOCK_TOKENS if busy else 0.0)
    ahead_s = queued_tokens * prompt_token_s
    # What is under way when it comes is half done, on average.
    begun_s = (step if busy else 0.0) / 2
    if busy + queued < slots:
        return FirstTokenEstimate(begun_s + ahead_s, prompt_token_s)
    rounds, place = divmod(queued - placeable, slots)
    first = taken[place]
    # So many steps until the slot is free, beside the chunks of the prompts before it.
    slot_s = (first + rounds * answer_tokens) * step + queued_tokens / rate
    return FirstTokenEstimate(begun_s + max(slot_s, ahead_s), prompt_token_s)
