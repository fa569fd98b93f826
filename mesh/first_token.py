"""Estimates one node's time to the first token of a request, from its last report. Pure arithmetic.

Where its engine told its own estimate:

    wait      the engine's wait_s, and what this node has sent it since: prompts to prefill at prompt_token_s a token,
              and slots, which become free at decode rate / answer length a second (Little's law) once none is left.
    prefill   the prompt's tokens that are not cached there x prompt_token_s.

Else, in the same spirit from rates alone:

    prefill   tokens to prefill before the first token / prefill rate. The tokens are this prompt's and those queued
              ahead of it: the engine prefills one sequence at a time, in arrival order.
    decode    a decode step for each prefill chunk, as the engine alternates them: chunks x active / decode rate. The
              rate is the total over the batch, so active / rate is the length of one step.
    slot      nothing while a slot is free for it. Else (position in the queue) x (answer length / decode rate).
"""

from __future__ import annotations

from mesh.own_dispatches import Ledger
from mesh.view import ModelLoad

BYTES_PER_TOKEN = 4  # of English text in usual tokenizers; only ratios between nodes matter
PREFILL_CHUNK_TOKENS = 64  # as the engine cuts them
# Tokens per second assumed until a node has measured its own: a small model on two cores.
PREFILL_RATE_DEFAULT = 500.0
DECODE_RATE_DEFAULT = 100.0
RATE_MIN = 0.01  # a slower one is a stall; keeps every estimate finite
ANSWER_TOKENS_DEFAULT = 256  # how long an answer is thought to be; most clients set no limit


def first_token_s(load: ModelLoad, own: Ledger, prompt_tokens: int) -> float:
    """Seconds, without the hop. own: what was sent to it and is not in the report. prompt_tokens: not cached there."""
    if load.prompt_token_s > 0.0:
        if not own.count:
            return load.wait_s + prompt_tokens * load.prompt_token_s
        # A report of no free slot waits for the first one already; one of free slots does not.
        rivals = own.count + 1 - load.free_slots if load.free_slots else own.count
        ahead_s = max(own.tokens * load.prompt_token_s, max(0, rivals) * slot_interval_s(load))
        return load.wait_s + ahead_s + prompt_tokens * load.prompt_token_s
    prefill_tokens = load.queued_tokens + own.tokens + prompt_tokens
    prefill_s = prefill_tokens / _rate(load.prefill_rate, PREFILL_RATE_DEFAULT)
    chunks = -(-prefill_tokens // PREFILL_CHUNK_TOKENS)
    decode_s = chunks * load.active / _rate(load.decode_rate, DECODE_RATE_DEFAULT)
    slot_s = max(0, load.queued + own.count + 1 - load.free_slots) * slot_interval_s(load)
    return prefill_s + decode_s + slot_s


def added_s(load: ModelLoad, own: Ledger, prompt_tokens: float) -> float:
    """Seconds by which one more such request ahead of it delays the next one's first token."""
    if load.free_slots <= load.queued + own.count:
        return slot_interval_s(load)
    token_s = load.prompt_token_s or 1 / _rate(load.prefill_rate, PREFILL_RATE_DEFAULT)
    return max(prompt_tokens, 1.0) * token_s


def slot_interval_s(load: ModelLoad) -> float:
    """Seconds from one slot becoming free to the next, with all of them busy."""
    return (load.answer_tokens or ANSWER_TOKENS_DEFAULT) / _rate(load.decode_rate, DECODE_RATE_DEFAULT)


def answers_per_s(load: ModelLoad, prompt_tokens: float) -> float:
    """What the node completes when all its slots are busy with prompts of so many tokens, not cached."""
    return 1.0 / (slot_interval_s(load) + prompt_tokens / _rate(load.prefill_rate, PREFILL_RATE_DEFAULT))


def tokens_of(text_bytes: int) -> int:
    return max(1, text_bytes // BYTES_PER_TOKEN)


def _rate(measured: float, default: float) -> float:
    return max(measured, RATE_MIN) if measured > 0.0 else default
