"""llama.cpp as a contestant, run by the peers environment: its own batches of several sequences, greedy.

llama_decode takes tokens of many sequences at once. Sequences join and leave between two calls as in llama.cpp's
server: every sequence's next token goes into a batch first, prompts that wait fill it up.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import llama_cpp
import numpy as np

from tests.benchmark.engine.worker import serve
from tests.benchmark.engine.workload import SHORT_PROMPT_TOKENS, Request, poisson_requests, prompt

BATCH_TOKENS_MAX = 512  # llama.cpp's physical batch by default
CONTEXT_TOKENS = 1024  # of each sequence
SEQUENCES_MAX = 16
EXACT_KV = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}  # float16 by default


@llama_cpp.llama_log_callback
def _drop_log(level: int, text: bytes, user_data: object) -> None:
    """llama.cpp logs every tensor it loads."""


@dataclass(slots=True)
class Slot:
    """A sequence in the running batch: what is left of its prompt, its next position, and the answer so far."""

    prompt: list[int]
    wanted: int
    position: int = 0
    answer: list[int] = field(default_factory=list)


class Context:
    """A context of `sequences` sequences, and the batch that is filled for it."""

    def __init__(self, model: Any, sequences: int, threads: int, **params: Any) -> None:
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = sequences * CONTEXT_TOKENS
        options.n_batch = options.n_ubatch = BATCH_TOKENS_MAX
        options.n_seq_max = sequences
        options.n_threads = options.n_threads_batch = threads
        options.no_perf = True
        for name, value in params.items():
            setattr(options, name, value)
        self._context = llama_cpp.llama_init_from_model(model, options)
        if not self._context:
            raise MemoryError(f"llama.cpp made no context of {sequences} x {CONTEXT_TOKENS} tokens")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS_MAX, 0, 1)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.slots: dict[int, Slot] = {}
        self.free = deque(range(sequences))

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)

    def add(self, slot: Slot) -> None:
        self.slots[self.free.popleft()] = slot

    def step(self) -> list[Slot]:
        """One batch. The sequences that have all their tokens have left, and are returned."""
        batch, sampling = self._batch, []
        batch.n_tokens = 0
        for sequence, slot in self.slots.items():
            if slot.answer:
                self._put(slot.answer[-1], slot, sequence, True)
                sampling.append(sequence)
        for sequence, slot in self.slots.items():
            room = BATCH_TOKENS_MAX - batch.n_tokens
            taken, slot.prompt = slot.prompt[:room], slot.prompt[room:]
            for index, token in enumerate(taken):
                self._put(token, slot, sequence, not slot.prompt and index == len(taken) - 1)
            if taken and not slot.prompt:
                sampling.append(sequence)
        if status := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (len(sampling), self._vocabulary))
        left = []
        for sequence, row in zip(sampling, logits, strict=True):
            slot = self.slots[sequence]
            slot.answer.append(int(row.argmax()))
            if len(slot.answer) == slot.wanted:
                llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)
                left.append(self.slots.pop(sequence))
                self.free.append(sequence)
        return left

    def _put(self, token: int, slot: Slot, sequence: int, is_sampled: bool) -> None:
        batch, index = self._batch, self._batch.n_tokens
        batch.token[index] = token
        batch.pos[index] = slot.position
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = sequence
        batch.logits[index] = is_sampled
        batch.n_tokens += 1
        slot.position += 1


class LlamaCpp:
    def __init__(self, file: str, threads: int) -> None:
        llama_cpp.llama_log_set(_drop_log, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise OSError(f"llama.cpp cannot load {file}")
        self._threads = threads or os.cpu_count() or 1
        self._contexts: dict[tuple[int, bool], Context] = {}

    def _context(self, sequences: int, *, kv_unified: bool = False) -> Context:
        """kv_unified: one KV buffer for all. It decodes slower, and takes prompts and steps in one batch."""
        key = sequences, kv_unified
        if key not in self._contexts:
            self._contexts[key] = Context(self._model, sequences, self._threads, kv_unified=kv_unified)
        return self._contexts[key]

    def prefill(self, tokens: int, seed: int) -> dict[str, Any]:
        context = self._context(1)
        started = time.perf_counter()
        context.add(Slot(prompt(seed, tokens), 1))
        while context.slots:
            context.step()
        return {"tokens_per_s": tokens / (time.perf_counter() - started)}

    def decode(self, n: int, tokens: int, seed: int) -> dict[str, Any]:
        context = self._context(n)
        for index in range(n):
            context.add(Slot(prompt(seed + index, SHORT_PROMPT_TOKENS), tokens + 1))
        context.step()
        started = time.perf_counter()
        while context.slots:
            context.step()
        return {"tokens_per_s": n * tokens / (time.perf_counter() - started)}

    def greedy(self, ids: list[int], tokens: int) -> dict[str, Any]:
        context = Context(self._model, 1, self._threads, **EXACT_KV)
        slot = Slot(list(ids), tokens)
        context.add(slot)
        while context.slots:
            context.step()
        context.close()
        return {"ids": slot.answer}

    def poisson(self, count: int, per_s: float, shortest: int, longest: int, seed: int, slots: int) -> dict[str, Any]:
        context = self._context(slots, kv_unified=True)
        waiting: deque[Request] = deque(poisson_requests(count, per_s, shortest, longest, seed))
        tokens = 0
        started = time.perf_counter()
        while waiting or context.slots:
            if not context.slots:
                time.sleep(max(0.0, waiting[0].at_s - (time.perf_counter() - started)))
            now = time.perf_counter() - started
            while waiting and context.free and waiting[0].at_s <= now:
                request = waiting.popleft()
                context.add(Slot(request.prompt, request.tokens))
            tokens += sum(slot.wanted for slot in context.step())
        return {"tokens_per_s": tokens / (time.perf_counter() - started)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    contestant = LlamaCpp(options.model, options.threads)
    serve({name: getattr(contestant, name) for name in ("prefill", "decode", "greedy", "poisson")})


if __name__ == "__main__":
    main()
