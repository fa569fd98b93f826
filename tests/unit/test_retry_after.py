"""Refused clients come back in the order they were promised, also those whose turn is beyond what they may be told."""

from __future__ import annotations

import heapq
import math
import random
import statistics
from dataclasses import dataclass, field

from mesh.retry_after import HELD_AHEAD_S, RETRY_AFTER_MAX_S, RetryQueue

PLACES_PER_S = 10.0
QUEUE_PLACES = 16
JITTER_S = 0.2


@dataclass
class Client:
    """told: (when, seconds) of each refusal."""

    key: int
    told: list[tuple[float, float]] = field(default_factory=list)
    let_in_at: float = math.nan


def overload(factor: float, seconds: float, seed: int) -> list[Client]:
    """An engine that gives a place every 1 / PLACES_PER_S, and clients who come back as told, as HTTP tells it."""
    rng = random.Random(seed)
    queue = RetryQueue()
    clients: list[Client] = []
    arrivals: list[tuple[float, int]] = []
    at = 0.0
    while at < seconds:
        at += rng.expovariate(factor * PLACES_PER_S)
        heapq.heappush(arrivals, (at, len(clients)))
        clients.append(Client(len(clients)))
    waiting, served_until = 0, 0.0
    while arrivals:
        now, number = heapq.heappop(arrivals)
        while waiting and served_until <= now:
            waiting -= 1
            served_until += 1 / PLACES_PER_S
        served_until = max(served_until, now - 1 / PLACES_PER_S)
        client = clients[number]
        places = QUEUE_PLACES - waiting
        if places > 0 and queue.admits(client.key, places, QUEUE_PLACES // 2, now):
            waiting += 1
            client.let_in_at = now
            continue
        told_s = math.ceil(queue.refuse(client.key, PLACES_PER_S, now))
        client.told.append((now, told_s))
        heapq.heappush(arrivals, (now + told_s + rng.uniform(0, JITTER_S), number))
    return clients


def errors(clients: list[Client]) -> list[float]:
    return [abs(client.let_in_at - at - told_s) / told_s for client in clients for at, told_s in client.told]


def test_most_refused_clients_are_let_in_when_they_were_told() -> None:
    found = errors(overload(factor=2.0, seconds=40.0, seed=7))
    assert len(found) > 300
    assert statistics.median(found) <= 0.1
    assert statistics.quantiles(found, n=10)[-1] <= 0.25


def test_who_has_to_wait_longer_than_may_be_told_is_let_in_at_its_turn_all_the_same() -> None:
    clients = overload(factor=4.0, seconds=60.0, seed=7)
    late = [client for client in clients if client.told and client.told[0][1] == RETRY_AFTER_MAX_S]
    assert len(late) > 500
    assert statistics.median(errors(clients)) <= 0.25
    # Of the newcomers few go before those who wait, and nobody is sent away more often than the minutes of its wait.
    order = sorted(range(len(clients)), key=lambda number: clients[number].let_in_at)
    displaced_s = [abs(place - number) / PLACES_PER_S for place, number in enumerate(order)]
    assert statistics.median(displaced_s) <= 3.0
    assert statistics.mean(len(client.told) for client in late) <= 4.0


def test_a_client_that_was_told_the_most_and_comes_then_has_not_lost_its_place() -> None:
    queue = RetryQueue()
    for key in range(1199):
        queue.refuse(key, 10.0, 0.0)
    now, told = 0.0, []
    while now < 119.0:
        told.append(queue.refuse("the last", 10.0, now))
        now += told[-1]
    assert told == [RETRY_AFTER_MAX_S, RETRY_AFTER_MAX_S, 2.0]
    assert len(queue) == 1200
    assert queue.admits("the last", 1, 1, now)


def test_a_place_is_held_for_who_comes_next_and_not_for_more_than_a_part() -> None:
    queue = RetryQueue()
    for key in range(10):
        queue.refuse(key, 10.0, 0.0)  # the first turn is at 0.1 s, the last at 1.0 s
    assert not queue.admits("new", 1, 4, 0.05)
    assert not queue.admits("new", 4, 4, 0.05)
    assert queue.admits("new", 5, 4, 0.05)
    assert queue.admits("new", 1, 4, 0.05 - HELD_AHEAD_S)
