"""Who is served next among sequences that wait: in order of arrival, and fair between those who ask.

Each asker (an API key, say) has a counter of the service it has received, in weighted tokens; the next sequence is the
oldest of the asker with the least. An asker that comes back does not bring credit from the time it asked for nothing:
its counter starts no lower than that of whoever was served last. This is the virtual token counter of Sheng et al.
2024, "Fairness in Serving Large Language Models". With one asker it is a plain queue.

Places are shared as well: who finds no room takes one of the asker that holds most, if that makes them more even. This
is the longest queue drop of McKenney 1990, "Stochastic Fairness Queueing".

Answers that another engine has begun go before all of these, first come first served: somebody reads them already, and
has paid for their beginning.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator

from nodes.engine.sequence import Sequence

# What a token costs, by the time it takes: a generated one needs a step of its own, prompt tokens share theirs.
PROMPT_TOKEN_COST = 1.0
GENERATED_TOKEN_COST = 2.0
# Askers whose counters are kept while they do not wait. Forgetting the least served one gives it at most what it had.
ASKERS_MAX = 4096


class FairQueue:
    """Sequences in the order in which they are to be served. The caller bounds how many there are."""

    def __init__(self) -> None:
        self._resumed: deque[Sequence] = deque()
        self._queues: dict[str, deque[tuple[int, Sequence]]] = {}  # the others by asker, none empty
        self._service: dict[str, float] = {}  # at most ASKERS_MAX of those who were served, and those who wait
        self._floor = 0.0
        self._arrivals = itertools.count()
        self._length = 0
        self._earliest_deadline = math.inf  # no waiting sequence has an earlier one

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._resumed
        for queue in self._queues.values():
            for _, sequence in queue:
                yield sequence

    def push(self, sequence: Sequence) -> None:
        asker = sequence.fairness_id
        if sequence.is_resumed:
            self._resumed.append(sequence)
        else:
            if asker not in self._queues:
                self._queues[asker] = deque()
                self._service[asker] = max(self._service.get(asker, 0.0), self._floor)
            self._queues[asker].append((next(self._arrivals), sequence))
        self._length += 1
        self._earliest_deadline = min(self._earliest_deadline, sequence.deadline)

    def pop(self) -> Sequence:
        """Take the next. Only while one waits."""
        if self._resumed:
            self._length -= 1
            return self._resumed.popleft()
        asker = min(self._queues, key=lambda name: (self._service[name], self._queues[name][0][0]))
        self._floor = max(self._floor, self._service[asker])
        _, sequence = self._queues[asker].popleft()
        self._removed(asker)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take this one, which waits."""
        if sequence.is_resumed:
            self._resumed.remove(sequence)
            self._length -= 1
            return
        asker = sequence.fairness_id
        queue = self._queues[asker]
        del queue[next(index for index, (_, other) in enumerate(queue) if other is sequence)]
        self._removed(asker)

    def displace_for(self, asker: str) -> Sequence | None:
        """Take the newest of the asker that holds most places, so that another one of `asker` finds room. Never one
        that another engine has begun.

        None, and nothing is taken, unless that asker then still holds at least as many as `asker` will: two askers
        would else take the same place from each other again and again."""
        heaviest = max(self._queues, key=lambda name: len(self._queues[name]), default=asker)
        if heaviest == asker or len(self._queues[heaviest]) < len(self._queues.get(asker, ())) + 2:
            return None
        _, sequence = self._queues[heaviest].pop()
        self._removed(heaviest)
        return sequence

    def pop_expired(self, now: float) -> list[Sequence]:
        """Take all whose deadline has passed."""
        if now < self._earliest_deadline:
            return []
        late = [sequence for sequence in self if now >= sequence.deadline]
        for sequence in late:
            self.remove(sequence)
        self._earliest_deadline = min((sequence.deadline for sequence in self), default=math.inf)
        return late

    def clear(self) -> None:
        self._resumed.clear()
        self._queues.clear()
        self._length = 0

    def charge(self, asker: str, *, prompt_tokens: int = 0, generated_tokens: int = 0, weight: float = 1.0) -> None:
        """The asker has received so much service. weight: with twice as much it gets twice as much."""
        cost = (prompt_tokens * PROMPT_TOKEN_COST + generated_tokens * GENERATED_TOKEN_COST) / weight
        self._service[asker] = max(self._service.get(asker, 0.0), self._floor) + cost
        if len(self._service) > ASKERS_MAX + len(self._queues):
            idle = (name for name in self._service if name not in self._queues and name != asker)
            del self._service[min(idle, key=self._service.__getitem__)]

    def _removed(self, asker: str) -> None:
        self._length -= 1
        if not self._queues[asker]:
            del self._queues[asker]
            if self._service[asker] <= self._floor:  # as much as a newcomer's
                del self._service[asker]
