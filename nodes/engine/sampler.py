"""Chooses tokens. The same params, position, tokens so far and logits give the same token in every batch and place.

A row's logits go through these steps, in this order, which is vLLM's; each is left out where the request does not ask
for it:

1. log-probabilities are taken: they are the model's own
2. logit_bias is added
3. end-of-sequence tokens are excluded before min_tokens
4. repetition penalty, then frequency and presence penalties
5. what the grammar forbids is excluded
6. greedy: the largest is taken; else temperature, min_p, top_k, top_p, and one of the rest is drawn

Where the grammar allows nothing but the end, the end it is, whatever min_tokens says.

Greedy takes the largest logit. Otherwise Gumbel-max (Gumbel 1954; Maddison et al. 2014): the token with the largest
`logit / T + g` is distributed as softmax(logits / T) when g are independent standard Gumbel variables. Here g is a pure
function of (seed, position, token id) and of which of several answers it is (nodes.engine.noise): there is no generator
whose state would have to travel with a sequence, and logits that differ a little, as between CPU and GPU, change the
token only where two scores nearly tie. Between equal scores the lowest id wins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

import numpy as np
import numpy.typing as npt

from nodes.engine.draw import draw
from nodes.engine.logprobs import RowLogprobs
from nodes.engine.noise import KeyNoise, noise_key, noise_of
from nodes.engine.sampling import Sampled, SamplingState

FloatArray = npt.NDArray[np.float32]

INVALID = -1  # instead of a token: the row's largest logit is not a finite number, or the grammar failed


def sample(logits: FloatArray, states: SequenceOf[SamplingState]) -> list[Sampled]:
    """One token, or INVALID, per row; state.error says why where the fault is not the logits'.

    logits: float32 [rows, vocabulary], may be overwritten. A grammar's mask is computed here where it was not before.
    """
    drawing = [state for state in states if state.draws]
    if not drawing:
        return [_sample_row(row, state, None) for row, state in zip(logits, states, strict=True)]
    keys = [noise_key(state.params.seed, state.position, state.params.choice) for state in drawing]
    noise = iter(noise_of(logits.shape[1]).of_keys(keys))
    return [
        _sample_row(row, state, next(noise) if state.draws else None) for row, state in zip(logits, states, strict=True)
    ]


def _sample_row(row: FloatArray, state: SamplingState, noise: KeyNoise | None) -> Sampled:
    """noise: None takes the likeliest."""
    best = int(row.argmax())
    peak = float(row[best])
    if not math.isfinite(peak):
        return Sampled(INVALID)
    logprobs = None
    if state.params.logprobs is not None:
        logprobs = RowLogprobs(row, peak, state.params.logprobs, is_row_kept=not state.changes_logits)
    if state.changes_logits:
        if not _change(row, state):
            return Sampled(INVALID)
        best = int(row.argmax())
        peak = float(row[best])
        if not math.isfinite(peak):
            return Sampled(INVALID)
    if noise is not None:
        best = draw(row, best, state.params, noise)
    return Sampled(best, None if logprobs is None else logprobs.token(best))


def _change(row: FloatArray, state: SamplingState) -> bool:
    """Steps 2 to 5. False where the grammar failed."""
    matcher = state.matcher
    if matcher is not None:
        matcher.prepare()
        if matcher.error is not None:
            return False
    if state.bias is not None:
        state.bias.apply(row)
    if state.generated < state.params.min_tokens and (matcher is None or not matcher.must_end):
        row[state.end_ids[state.end_ids < len(row)]] = -np.inf
    if state.penalties is not None:
        state.penalties.apply(row)
    if matcher is not None:
        matcher.forbid(row)
    return True
