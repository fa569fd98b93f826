"""What becomes of datagrams and of peer links between two names: loss, duplicates, delays, cuts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

LINK_ROUND_TRIPS = 3  # to open a link, shake hands and ask: TCP's, ours, the request's


@dataclass(slots=True)
class Network:
    """Probabilities per datagram, delays in seconds."""

    loss: float = 0.0
    duplication: float = 0.0
    delay_min_s: float = 0.0002
    delay_max_s: float = 0.002  # beyond the spacing of datagrams, so they overtake each other
    cuts: set[tuple[str, str]] = field(default_factory=set)  # (from, to), one way each

    def arrivals(self, rng: random.Random, sender: str, receiver: str) -> list[float]:
        """After how many seconds each copy of a datagram arrives; none where it is lost."""
        if (sender, receiver) in self.cuts:
            return []
        copies = 2 if self.duplication and rng.random() < self.duplication else 1
        return [self.delay_s(rng) for _ in range(copies) if not self.loss or rng.random() >= self.loss]

    def delay_s(self, rng: random.Random) -> float:
        return self.delay_min_s + rng.random() * (self.delay_max_s - self.delay_min_s)

    def link_delay_s(self, rng: random.Random, asker: str, answerer: str) -> float | None:
        """How long a request over a peer link takes one way, or None across a cut in either direction: TCP needs
        both. Loss only slows it, by a retransmission each of 0.2 s, as TCP's."""
        if (asker, answerer) in self.cuts or (answerer, asker) in self.cuts:
            return None
        delay_s = sum(self.delay_s(rng) for _ in range(LINK_ROUND_TRIPS))
        while self.loss and rng.random() < self.loss and delay_s < 3.0:
            delay_s += 0.2
        return delay_s

    def partition(self, groups: Sequence[Iterable[str]]) -> None:
        """Cut every pair of names from different groups, both ways."""
        sides = [list(group) for group in groups]
        for a, b in itertools.permutations(sides, 2):
            self.cuts |= {(x, y) for x in a for y in b}

    def heal(self) -> None:
        self.cuts.clear()
