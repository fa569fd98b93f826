"""Turns examples into batches of tokens. The only place that knows how a training sequence is laid out."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from deploy.models.demo.corpus import FALLBACK, Group
from deploy.models.demo.generate import Generator
from deploy.models.demo.tokenizer import ASSISTANT_ID, END_ID, USER_ID

QUESTION_TOKENS_MAX = 60
POOL_BATCHES = 16  # sorted by length together, so that batches carry next to no padding
CUT_ANSWER_TOKENS = (1, 4)  # answers that are not given in full end after so many tokens
CUT_SHARE = 0.2  # of the questions get words cut into unusual tokens, which does what BPE dropout does, seeded
CUT_CHANCE = 0.06  # per letter of such a question
IGNORED = -100


@dataclass(frozen=True, slots=True)
class AnswerShares:
    """How much of the examples teaches to say an answer; the rest teaches to choose one, and is short.

    full: whole answers. foreign: whole answers after somebody else's question: once begun, an answer is finished.
    """

    full: float
    foreign: float


@dataclass(frozen=True, slots=True)
class _Row:
    """One sequence: tokens begin with `prompt` tokens of question; those before `known` carry no loss."""

    tokens: list[int]
    prompt: int
    known: int
    group: int


class Batches:
    """Turns examples into tensors, POOL_BATCHES at a time."""

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        groups: Sequence[Group],
        rng: random.Random,
        batch: int,
        shares: AnswerShares,
    ) -> None:
        self._generator, self._tokenizer, self._rng, self._batch = generator, tokenizer, rng, batch
        self._shares = shares
        self._answers = [[*token_ids(tokenizer, group.answer), END_ID] for group in groups]
        self._answers.append([*token_ids(tokenizer, FALLBACK), END_ID])  # found at FALLBACK_GROUP
        self._telling = [_telling_tokens(answer, self._answers) for answer in self._answers]
        self._pool: list[list[_Row]] = []

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
        """Ids [batch, steps], targets [batch, steps], last prompt positions [batch], groups [batch].

        A target or a group that carries no loss is IGNORED.
        """
        if not self._pool:
            self._fill()
        rows = self._pool.pop()
        width = max(len(row.tokens) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        targets = torch.full((len(rows), width), IGNORED)
        for index, row in enumerate(rows):
            count = len(row.tokens)
            ids[index, :count] = torch.tensor(row.tokens)
            targets[index, row.known - 1 : count - 1] = ids[index, row.known : count]
        last = torch.tensor([row.prompt - 1 for row in rows])
        return ids, targets, last, torch.tensor([row.group for row in rows])

    def _fill(self) -> None:
        rows = [self._row() for _ in range(self._batch * POOL_BATCHES)]
        rows.sort(key=lambda row: len(row.tokens))
        self._pool = [rows[start : start + self._batch] for start in range(0, len(rows), self._batch)]
        self._rng.shuffle(self._pool)

    def _row(self) -> "_Row":
        example = self._generator.example()
        prompt = [USER_ID, *self._question(example.question)[:QUESTION_TOKENS_MAX], ASSISTANT_ID]
        dice = self._rng.random()
        if dice < self._shares.foreign:
            group = self._rng.randrange(self.group_count)
            tokens = prompt + self._answers[group]
            return _Row(tokens, len(prompt), min(len(prompt) + self._telling[group], len(tokens) - 1), IGNORED)
        group = example.group % self.group_count
        answer = self._answers[group]
        if dice >= self._shares.foreign + self._shares.full:
            answer = answer[: self._rng.randint(*CUT_ANSWER_TOKENS)]
        return _Row(prompt + answer, len(prompt), len(prompt), group)

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


def _telling_tokens(answer: list[int], answers: list[list[int]]) -> int:
    """How many tokens of answer it takes until no other answer begins alike."""
    others = [other for other in answers if other is not answer]
    return next(
        (count for count in range(1, len(answer)) if not any(o[:count] == answer[:count] for o in others)), len(answer)
    )
