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

from nodes.engine.draw import DRAWS_AT_ONCE, draw
from nodes.engine.logit_rows import LogitBlocks, LogitRows
from nodes.engine.logprobs import RowLogprobs
from nodes.engine.noise import noise_key, noise_of
from nodes.engine.sampling import Sampled, SamplingState

FloatArray = npt.NDArray[np.float32]

INVALID = -1  # instead of a token: the row's largest logit is not a finite number, or the grammar failed


def sample(logits: FloatArray, states: SequenceOf[SamplingState], blocks: LogitBlocks | None = None) -> list[Sampled]:
    """One token, or INVALID, per row; state.error says why where the fault is not the logits'.

    logits: float32 [rows, vocabulary], may be overwritten. blocks: of these rows, and of more after them maybe. A
    grammar's mask is computed here where it was not before.
    """
    found: list[Sampled] = []
    drawing: list[int] = []  # rows
    logprobs: dict[int, RowLogprobs] = {}
    for index, (row, state) in enumerate(zip(logits, states, strict=True)):
        token_id = _likeliest(row, None if blocks is None else blocks.likeliest(index))
        if token_id != INVALID and state.params.logprobs is not None:
            is_row_kept = not state.changes_logits
            logprobs[index] = RowLogprobs(row, float(row[token_id]), state.params.logprobs, is_row_kept=is_row_kept)
        if token_id != INVALID and state.changes_logits:
            token_id = _likeliest(row) if _change(row, state) else INVALID
        found.append(Sampled(token_id))
        if state.draws and token_id != INVALID:
            drawing.append(index)
    for start in range(0, len(drawing), DRAWS_AT_ONCE):
        _draw(logits, blocks, states, drawing[start : start + DRAWS_AT_ONCE], found)
    for index, row_logprobs in logprobs.items():
        if found[index].token_id != INVALID:
            found[index].logprobs = row_logprobs.token(found[index].token_id)
    return found


def _likeliest(row: FloatArray, known: int | None = None) -> int:
    """The lowest id of the largest logit, which may be known, or INVALID where that is not a finite number."""
    best = int(row.argmax()) if known is None else known
    return best if math.isfinite(row[best]) else INVALID


def _draw(
    logits: FloatArray,
    blocks: LogitBlocks | None,
    states: SequenceOf[SamplingState],
    drawing: list[int],
    found: list[Sampled],
) -> None:
    """Replace the likeliest token of these rows by one that is drawn."""
    some = [states[index] for index in drawing]
    keys = [noise_key(state.params.seed, state.position, state.params.choice) for state in some]
    noise = noise_of(logits.shape[1]).of_keys(keys)
    likeliest = [found[index].token_id for index in drawing]
    params = [state.params for state in some]
    places = [None if states[index].changes_logits else index for index in drawing]
    rows = LogitRows([logits[index] for index in drawing], blocks, places)
    token_ids = draw(rows, likeliest, params, noise)
    for index, token_id in zip(drawing, token_ids, strict=True):
        found[index].token_id = token_id


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
