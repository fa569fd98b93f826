"""Who asks what and when: Poisson arrivals, bursts, and chats of several turns that share system prompts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

Trace = Literal["poisson", "bursts", "chats"]
TRACES: tuple[Trace, ...] = ("poisson", "bursts", "chats")

BLOCK_TOKENS = 64  # of 256 bytes of text each
BYTES_PER_TOKEN = 4
# Lengths are log-normal, so some are many times the mean; in tokens: median, sigma, least, most.
PROMPT = (150.0, 1.0, 8, 1800)
ANSWER = (120.0, 0.9, 4, 1200)
SYSTEM = (500.0, 0.5, 64, 1500)
MESSAGE = (50.0, 0.9, 4, 600)
# Of chats: applications with a system prompt each, the r-th used in proportion to 1/r; turns; seconds of thought.
SYSTEMS = 32
TURNS_MEAN = 4
THINK_S_MEAN = 8.0
CHAT_TOKENS_MAX = 3000
# Of bursts: each BURST_EVERY_S, for BURST_S, arrivals come at BURST_FACTOR times the rate between.
BURST_EVERY_S = 20.0
BURST_S = 4.0
BURST_FACTOR = 5.0


@dataclass(frozen=True, slots=True)
class Conversation:
    """A text that only grows. Two of the same system share their first system_tokens."""

    number: int
    system: int
    system_tokens: int

    def names(self, tokens: int) -> tuple[int, ...]:
        """Of its whole blocks within so many tokens, as nodes.engine.prefix_digest names them: by all text before."""
        shared = self.system_tokens // BLOCK_TOKENS
        return tuple(
            _mix(self.system if block < shared else (1 << 32) + self.number, block)
            for block in range(tokens // BLOCK_TOKENS)
        )


@dataclass(slots=True, eq=False)
class Request:
    """One question. entry: the number that says which entry gets it."""

    number: int
    at: float
    conversation: Conversation
    prompt_tokens: int
    answer_tokens: int
    entry: int
    blocks: tuple[int, ...] = ()
    prompt_bytes: int = 0
    chat: Chat | None = None
    # What became of it.
    tried_at: float = 0.0
    refusals: list[tuple[float, float]] = field(default_factory=list)  # when, and seconds told

    def __post_init__(self) -> None:
        self.blocks = self.conversation.names(self.prompt_tokens)
        self.prompt_bytes = self.prompt_tokens * BYTES_PER_TOKEN


@dataclass(slots=True)
class Chat:
    """The rest of one chat: what each further turn adds. Drawn beforehand, so that every policy gets the same."""

    turns: list[tuple[float, int, int]]  # seconds of thought, tokens of the message, of the answer


def shared_tokens(a: Conversation, b: Conversation, tokens_a: int, tokens_b: int) -> int:
    """In which both begin alike."""
    common = min(tokens_a, tokens_b)
    if a.number == b.number:
        return common
    return min(common, a.system_tokens) if a.system == b.system and a.system >= 0 else 0


def next_turn(request: Request, number: int, now: float) -> Request | None:
    """The chat's next request, after an answer that ended now."""
    chat = request.chat
    if chat is None or not chat.turns:
        return None
    think_s, message, answer = chat.turns.pop(0)
    prompt = request.prompt_tokens + request.answer_tokens + message
    if prompt > CHAT_TOKENS_MAX:
        return None
    return Request(number, now + think_s, request.conversation, prompt, answer, request.entry, chat=chat)


def arrivals(
    trace: Trace, seed: int, work_per_s: float, prefill_rate: float, token_s: float, seconds: float
) -> Iterator[Request]:
    """First requests, in order of time, such that they and what follows make work_per_s seconds of work a second, cold.

    token_s: of one answer token's share of a full batch."""
    drafts = [_draft(trace, random.Random(f"{seed}|draft|{i}"), i) for i in range(2000)]
    work_s = sum(_work_s(draft, prefill_rate, token_s) for draft in drafts) / len(drafts)
    rate = work_per_s / work_s
    rng = random.Random(f"{seed}|arrivals")
    quiet = rate * BURST_EVERY_S / (BURST_EVERY_S + (BURST_FACTOR - 1) * BURST_S) if trace == "bursts" else rate
    now, number = 0.0, 0
    top = quiet * (BURST_FACTOR if trace == "bursts" else 1.0)
    while True:
        now += rng.expovariate(top)
        if now > seconds:
            return
        if trace == "bursts" and now % BURST_EVERY_S >= BURST_S and rng.random() * BURST_FACTOR > 1.0:
            continue
        request = _draft(trace, random.Random(f"{seed}|request|{number}"), number)
        request.at = now
        number += 1
        yield request


def _draft(trace: Trace, rng: random.Random, number: int) -> Request:
    entry = rng.randrange(1 << 30)
    if trace != "chats":
        alone = Conversation(number, -1, 0)
        return Request(number, 0.0, alone, _length(rng, PROMPT), _length(rng, ANSWER), entry)
    system = rng.choices(range(SYSTEMS), [1 / (rank + 1) for rank in range(SYSTEMS)])[0]
    system_tokens = _length(random.Random(f"system|{system}"), SYSTEM)
    turns = [(0.0, _length(rng, MESSAGE), _length(rng, ANSWER))]
    while rng.random() > 1 / TURNS_MEAN:
        turns.append((rng.expovariate(1 / THINK_S_MEAN), _length(rng, MESSAGE), _length(rng, ANSWER)))
    _, message, answer = turns.pop(0)
    conversation = Conversation(number, system, system_tokens)
    return Request(number, 0.0, conversation, system_tokens + message, answer, entry, chat=Chat(turns))


def _work_s(draft: Request, prefill_rate: float, token_s: float) -> float:
    total, prompt, answer = 0.0, draft.prompt_tokens, draft.answer_tokens
    for _, message, following in [*(draft.chat.turns if draft.chat else []), (0.0, 0, 0)]:
        total += prompt / prefill_rate + answer * token_s
        prompt, answer = prompt + answer + message, following
        if prompt > CHAT_TOKENS_MAX:
            break
    return total


def _length(rng: random.Random, shape: tuple[float, float, int, int]) -> int:
    median, sigma, least, most = shape
    return int(min(max(median * rng.lognormvariate(0.0, sigma), least), most))


def _mix(text: int, block: int) -> int:
    """A 64-bit name (the finaliser of splitmix64)."""
    value = (text * 0x9E3779B97F4A7C15 + block * 0xD1B54A32D192ED03 + 1) & (2**64 - 1)
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return value ^ (value >> 31)
