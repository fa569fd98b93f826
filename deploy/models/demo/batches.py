"""Turns examples into batches of tokens. The only place that knows how a training sequence is laid out."""

import random
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer

from deploy.models.demo.corpus import FALLBACK, Group
from deploy.models.demo.generate import Generator
from deploy.models.demo.tokenizer import ASSISTANT_ID, END_ID, USER_ID

QUESTION_TOKENS_MAX = 60
POOL_BATCHES = 16  # sorted by length together, so that batches carry next to no padding
FULL_ANSWER_SHARE = 0.1
CUT_ANSWER_TOKENS = (1, 5)  # the other answers end after so many tokens
CUT_SHARE = 0.3  # of the questions get words cut into unusual tokens, which does what BPE dropout does, seeded
CUT_CHANCE = 0.06  # per letter of such a question
IGNORED = -100


class Batches:
    """Turns examples into tensors, POOL_BATCHES at a time."""

    def __init__(
        self, generator: Generator, tokenizer: Tokenizer, groups: Sequence[Group], rng: random.Random, batch: int
    ) -> None:
        self._generator, self._tokenizer, self._rng, self._batch = generator, tokenizer, rng, batch
        self._answers = [[*token_ids(tokenizer, group.answer), END_ID] for group in groups]
        self._answers.append([*token_ids(tokenizer, FALLBACK), END_ID])  # found at FALLBACK_GROUP
        self._pool: list[list[tuple[list[int], int, int]]] = []

    @property
    def group_count(self) -> int:
        """Groups of the corpus and the fallback, which comes last."""
        return len(self._answers)

    def questions(self, count: int) -> tuple[list[list[int]], torch.Tensor]:
        """Question tokens without the template, none empty, and their groups [count]."""
        examples = [self._generator.example() for _ in range(count)]
        tokens = [self._question(example.question)[:QUESTION_TOKENS_MAX] or [END_ID] for example in examples]
        return tokens, torch.tensor([example.group % self.group_count for example in examples])

    def next(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids [batch, steps], targets [batch, steps] or IGNORED, last prompt positions [batch], groups [batch]."""
        if not self._pool:
            self._fill()
        rows = self._pool.pop()
        width = max(len(ids) for ids, _, _ in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        targets = torch.full((len(rows), width), IGNORED)
        for row, (tokens, prompt, _) in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            targets[row, prompt - 1 : len(tokens) - 1] = ids[row, prompt : len(tokens)]
        last = torch.tensor([prompt - 1 for _, prompt, _ in rows])
        groups = torch.tensor([group % len(self._answers) for _, _, group in rows])
        return ids, targets, last, groups

    def _fill(self) -> None:
        size = self._batch
        examples = [self._generator.example() for _ in range(size * POOL_BATCHES)]
        rows = []
        for example in examples:
            prompt = [USER_ID, *self._question(example.question)[:QUESTION_TOKENS_MAX], ASSISTANT_ID]
            answer = self._answers[example.group]
            if self._rng.random() >= FULL_ANSWER_SHARE:
                answer = answer[: self._rng.randint(*CUT_ANSWER_TOKENS)]
            rows.append((prompt + answer, len(prompt), example.group))
        rows.sort(key=lambda row: len(row[0]))
        self._pool = [rows[start : start + size] for start in range(0, len(rows), size)]
        self._rng.shuffle(self._pool)

    def _question(self, text: str) -> list[int]:
        if self._rng.random() >= CUT_SHARE:
            return token_ids(self._tokenizer, text)
        cuts = [i for i in range(1, len(text)) if text[i - 1].isalnum() and self._rng.random() < CUT_CHANCE]
        ids: list[int] = []
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            ids += token_ids(self._tokenizer, text[start:end])
        return ids


def token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text).ids
    return ids
