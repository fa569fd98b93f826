"""Which inputs are computed together: a step is filled up to its tokens with inputs of similar length, fairly.

Every request has a tag, its share of service so far; the request with the least goes first and its longest waiting
input sets the length of the step. Others, in the order of their tags, add inputs that need little padding. What a
request is given raises its tag by its tokens over its weight; the clock from which new requests start goes on by the
same tokens over all weights, so a request of thousands of inputs delays small ones by a step or two and is not
delayed by them for ever (Demers, Keshav and Shenker, "Analysis and Simulation of a Fair Queueing Algorithm", 1989).
Sees no clock and no thread.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nodes.engine.errors import QueueFull

IntArray = npt.NDArray[np.int64]

# An input joins a step whose length it has at least by this share: what is computed of a padded row is lost.
LENGTH_SHARE_MIN = 0.75
SHORT_TOKENS = 16  # padding up to here costs less than a step of its own
QUEUED_TOKENS_MAX = 8_000_000  # of all requests that wait: 64 MB


class EmbeddingRequest:
    """The inputs of one request that wait or are computed. Indices are of `inputs`."""

    __slots__ = ("_lengths", "_order", "fairness_id", "inputs", "number", "tag", "tokens", "unfinished", "weight")

    def __init__(self, inputs: Sequence[IntArray], fairness_id: str = "", weight: float = 1.0) -> None:
        assert inputs, "a request without inputs"
        self.inputs = inputs
        self.fairness_id = fairness_id
        self.weight = weight
        self.tokens = sum(map(len, inputs))
        self.unfinished = len(inputs)
        self.tag = 0.0
        self.number = 0
        self._order = sorted(range(len(inputs)), key=lambda index: len(inputs[index]))  # shortest first
        self._lengths = [len(inputs[index]) for index in self._order]

    @property
    def waiting(self) -> int:
        """Inputs not taken yet."""
        return len(self._order)

    @property
    def longest(self) -> int:
        return self._lengths[-1]

    def take(self, longest: int, shortest: int, count: int) -> list[int]:
        """Remove up to `count` waiting inputs of these lengths, the longest ones, and return their indices."""
        end = bisect_right(self._lengths, longest)
        start = max(bisect_right(self._lengths, shortest - 1), end - count)
        taken = self._order[start:end]
        del self._order[start:end], self._lengths[start:end]
        return taken[::-1]


@dataclass(frozen=True, slots=True)
class Step:
    """rows: (request, index of the input), computed together. tokens: without padding."""

    rows: Sequence[tuple[EmbeddingRequest, int]]
    tokens: int

    @property
    def requests(self) -> set[EmbeddingRequest]:
        return {request for request, _ in self.rows}

    def by_request(self) -> list[Step]:
        """The same rows, a step for each request."""
        found: dict[EmbeddingRequest, list[tuple[EmbeddingRequest, int]]] = {}
        for row in self.rows:
            found.setdefault(row[0], []).append(row)
        return [Step(rows, sum(len(request.inputs[i]) for request, i in rows)) for rows in found.values()]

    def inputs(self) -> list[IntArray]:
        return [request.inputs[index] for request, index in self.rows]


class EmbeddingQueue:
    """request_limit: requests that may wait. rows_max, step_tokens: of one step, tokens with padding."""

    def __init__(self, request_limit: int, rows_max: int, step_tokens: int) -> None:
        self._request_limit = request_limit
        self._rows_max = rows_max
        self._step_tokens = step_tokens
        self._requests: set[EmbeddingRequest] = set()  # with an input that waits
        self._askers: Counter[str] = Counter()
        self._clock = 0.0
        self._number = 0
        self.tokens = 0  # that wait

    def __len__(self) -> int:
        """Requests that have an input waiting."""
        return len(self._requests)

    def submit(self, request: EmbeddingRequest) -> None:
        """Raises QueueFull; nothing was queued then."""
        is_large = self._requests and self.tokens + request.tokens > QUEUED_TOKENS_MAX
        if len(self._requests) >= self._request_limit or is_large:
            raise QueueFull(len(self._requests), self._request_limit)
        self._number += 1
        request.number, request.tag = self._number, self._clock
        self._requests.add(request)
        self._askers[request.fairness_id] += 1
        self.tokens += request.tokens

    def cancel(self, request: EmbeddingRequest) -> None:
        """Forget what waits of it. Any number of times."""
        if request in self._requests:
            self.tokens -= sum(
                len(request.inputs[index]) for index in request.take(request.longest, 0, request.waiting)
            )
            self._remove(request)

    def clear(self) -> None:
        for request in list(self._requests):
            self.cancel(request)

    def next_step(self) -> Step | None:
        """Take the inputs of the next step out of the queue. None where nothing waits."""
        if not self._requests:
            return None
        ordered = sorted(self._requests, key=lambda request: (request.tag, request.number))
        longest = ordered[0].longest
        shortest = 0 if longest <= SHORT_TOKENS else int(longest * LENGTH_SHARE_MIN)
        room = max(1, min(self._rows_max, self._step_tokens // longest))
        weights = sum(request.weight / self._askers[request.fairness_id] for request in ordered)
        rows: list[tuple[EmbeddingRequest, int]] = []
        total = 0
        for request in ordered:
            if not room:
                break
            taken = request.take(longest, shortest, room)
            if not taken:
                continue
            tokens = sum(len(request.inputs[index]) for index in taken)
            rows += ((request, index) for index in taken)
            room -= len(taken)
            total += tokens
            request.tag += tokens * self._askers[request.fairness_id] / request.weight
        self._clock += total / weights
        self.tokens -= total
        for request, _ in rows:
            if not request.waiting and request in self._requests:
                self._remove(request)
        return Step(rows, total)

    def _remove(self, request: EmbeddingRequest) -> None:
        self._requests.discard(request)
        self._askers[request.fairness_id] -= 1
        if not self._askers[request.fairness_id]:
            del self._askers[request.fairness_id]
