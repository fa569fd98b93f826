"""Microseconds that the sampler takes for a row of logits, by vocabulary, shape of the logits and what is asked for.

`python -m tests.benchmark.sampler [--rounds 300] [--only TEXT]` prints one JSON line per case: the median and the least
over the rounds, a row, where one row is sampled and where 16 are together; `blocks` is true where the largest logit of
each block is known (nodes.engine.logit_rows). Time is that of the processor on the one thread, so that others' load
counts little: what remains of it is cold caches. Shapes: `peaked` is a trained model's row (a few likely tokens above
N(0, 2)), `flat` is N(0, 3), that of a random model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from itertools import product

import numpy as np
import numpy.typing as npt

from nodes.engine.logit_rows import BLOCK_LOGITS, LogitBlocks
from nodes.engine.sampler import sample
from nodes.engine.sampling import SamplingParams, SamplingState

VOCABULARIES = (32_000, 152_000)
ROWS = 16  # of logits, taken in turn: together more than the first-level cache holds, as in a batch
PROMPT = range(0, 600, 3)

CASES = {
    "greedy": SamplingParams(temperature=0.0),
    "T=1": SamplingParams(),
    "T=1.5": SamplingParams(temperature=1.5),
    "T=1 top_p=.95": SamplingParams(top_p=0.95),
    "T=1.5 top_p=.95": SamplingParams(temperature=1.5, top_p=0.95),
    "T=1 top_p=.3": SamplingParams(top_p=0.3),
    "T=1 top_k=50": SamplingParams(top_k=50),
    "T=1 min_p=.05": SamplingParams(min_p=0.05),
    "T=1 top_k=50 top_p=.95": SamplingParams(top_k=50, top_p=0.95),
    "greedy penalties": SamplingParams(temperature=0.0, presence_penalty=0.5, repetition_penalty=1.1),
    "greedy logprobs=5": SamplingParams(temperature=0.0, logprobs=5),
}


def rows(vocabulary: int, shape: str) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(1)
    if shape == "flat":
        return rng.normal(0, 3, (ROWS, vocabulary)).astype(np.float32)
    logits = rng.normal(0, 2, (ROWS, vocabulary)).astype(np.float32)
    for row in logits:
        row[rng.integers(0, vocabulary, 20)] += np.linspace(16, 8, 20, dtype=np.float32)
    return logits


def measure(
    logits: npt.NDArray[np.float32], params: SamplingParams, count: int, rounds: int, *, has_blocks: bool
) -> tuple[float, float]:
    """Median and least microseconds a row, of `count` rows together."""
    maxima, sums = logits.reshape(len(logits), -1, BLOCK_LOGITS).max(axis=2), logits.sum(axis=1)
    states = [SamplingState(replace(params, seed=seed), PROMPT, frozenset({2})) for seed in range(count)]
    changes = params.presence_penalty != 0.0
    seconds = []
    for number in range(rounds):
        at = number * count % len(logits)
        rows = logits[at : at + count]
        rows = rows.copy() if changes else rows
        blocks = LogitBlocks(rows, maxima[at : at + count], sums[at : at + count]) if has_blocks else None
        started = time.thread_time()
        sampled = sample(rows, states, blocks)
        seconds.append((time.thread_time() - started) / count)
        for state, each in zip(states, sampled, strict=True):
            state.accept(each.token_id)
    return statistics.median(seconds) * 1e6, min(seconds) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    options = parser.parse_args()
    for vocabulary in VOCABULARIES:
        for shape in ("peaked", "flat"):
            logits = rows(vocabulary, shape)
            for name, params in CASES.items():
                for count, has_blocks in product((1, ROWS), (False, True)) if options.only in name else ():
                    median, least = measure(logits, params, count, options.rounds, has_blocks=has_blocks)
                    figures: dict[str, float] = {"rows": count, "blocks": has_blocks}
                    figures |= {"median_us": round(median, 1), "least_us": round(least, 1)}
                    print(json.dumps({"vocabulary": vocabulary, "logits": shape, "case": name} | figures), flush=True)


if __name__ == "__main__":
    main()
