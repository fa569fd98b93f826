"""What every contestant is asked: prompts and requests, the same from the same seed. Needs no package."""

from __future__ import annotations

import random
from dataclasses import dataclass

SHORT_PROMPT_TOKENS = 16  # of the decode rows: what is measured there begins after it
FIRST_ID, LAST_ID = 10, 249  # ids that every vocabulary here has, and none of them special


@dataclass(frozen=True, slots=True)
class Request:
    """A request that arrives at_s seconds after the first, with a prompt, and wants so many tokens."""

    at_s: float
    prompt: list[int]
    tokens: int


def prompt(seed: int, tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(FIRST_ID, LAST_ID) for _ in range(tokens)]


def poisson_requests(count: int, per_s: float, shortest: int, longest: int, seed: int) -> list[Request]:
    """Exponential gaps between arrivals; lengths of prompts and answers uniform in [shortest, longest]."""
    rng = random.Random(seed)
    requests, at_s = [], 0.0
    for index in range(count):
        length = rng.randint(shortest, longest)
        requests.append(Request(at_s, prompt(seed * 1000 + index, length), rng.randint(shortest, longest)))
        at_s += rng.expovariate(per_s)
    return requests
