"""onnxruntime-genai as a contestant, run by the peers environment: static batches, greedy."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import deque
from typing import Any

import numpy as np
import onnxruntime_genai as og

from tests.benchmark.engine.worker import serve
from tests.benchmark.engine.workload import SHORT_PROMPT_TOKENS, Request, poisson_requests, prompt

PAD_ID = 2


class Genai:
    def __init__(self, folder: str, threads: int) -> None:
        config = og.Config(folder)
        # Left alone it takes one thread on some machines, where the others take every core.
        options = {"session_options": {"intra_op_num_threads": threads or os.cpu_count()}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self._model = og.Model(config)

    def _generator(self, prompts: list[list[int]], tokens: int) -> Any:
        """A generator of one batch, its prompts padded on the left and not prefilled yet."""
        width = max(len(ids) for ids in prompts)
        params = og.GeneratorParams(self._model)
        params.set_search_options(batch_size=len(prompts), max_length=width + tokens, do_sample=False)
        padded = np.array([[PAD_ID] * (width - len(ids)) + ids for ids in prompts], np.int32)
        return og.Generator(self._model, params), padded

    def prefill(self, tokens: int, seed: int) -> dict[str, Any]:
        generator, ids = self._generator([prompt(seed, tokens)], 4)
        started = time.perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()
        return {"tokens_per_s": tokens / (time.perf_counter() - started)}

    def decode(self, n: int, tokens: int, seed: int) -> dict[str, Any]:
        prompts = [prompt(seed + index, SHORT_PROMPT_TOKENS) for index in range(n)]
        generator, ids = self._generator(prompts, tokens + 4)
        generator.append_tokens(ids)
        generator.generate_next_token()
        started = time.perf_counter()
        for _ in range(tokens):
            generator.generate_next_token()
        return {"tokens_per_s": n * tokens / (time.perf_counter() - started)}

    def greedy(self, ids: list[int], tokens: int) -> dict[str, Any]:
        generator, padded = self._generator([ids], tokens + 1)
        generator.append_tokens(padded)
        for _ in range(tokens):
            generator.generate_next_token()
        return {"ids": [int(token) for token in generator.get_sequence(0)][len(ids) :]}

    def poisson(self, count: int, per_s: float, shortest: int, longest: int, seed: int, slots: int) -> dict[str, Any]:
        """Batches of up to `slots` of the requests that have arrived; a batch lasts as long as its longest answer."""
        waiting = deque(poisson_requests(count, per_s, shortest, longest, seed))
        tokens = 0
        started = time.perf_counter()
        while waiting:
            time.sleep(max(0.0, waiting[0].at_s - (time.perf_counter() - started)))
            now = time.perf_counter() - started
            batch: list[Request] = []
            while waiting and waiting[0].at_s <= now and len(batch) < slots:
                batch.append(waiting.popleft())
            steps = max(request.tokens for request in batch)
            generator, ids = self._generator([request.prompt for request in batch], steps)
            generator.append_tokens(ids)
            for _ in range(steps):
                generator.generate_next_token()
            tokens += sum(request.tokens for request in batch)
        return {"tokens_per_s": tokens / (time.perf_counter() - started)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    contestant = Genai(options.model, options.threads)
    serve({name: getattr(contestant, name) for name in ("prefill", "decode", "greedy", "poisson")})


if __name__ == "__main__":
    main()
