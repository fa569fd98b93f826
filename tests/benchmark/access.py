"""`python -m tests.benchmark.access`: CPU that authentication and limits take of a request. One JSON line of figures.

In this process, without HTTP and engines: production gate, limiter, counters and key book, as one of four nodes whose
peers tell of their use, on a clock that the benchmark moves. Each request is authenticated, admitted under limits of
all three kinds, counted token by token, ended, and its rate-limit headers are written. Every key in use has a window
that is full in its finest grain, its own and its peers', which is the dearest there is. What is told by gossip is
encoded within the time measured. Settings take turns, request batches of some milliseconds, so that a machine that
changes its speed changes all alike; figures are medians. Exit status 1 where one of these does not hold:

  gate_us         CPU of one request with a key and limits, less that of one in an open mesh: at most 200 µs
  refusal_us      CPU of one request that is refused: at most 200 µs
  ten_thousand    10,000 keys in the store instead of 10: at most 1.10 times as much
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import trio

from mesh.counters import PeerCounters
from mesh.counters_wire import Report, Totals, Usage
from mesh.own_counters import OwnCounters
from mesh.replica import Replica
from mesh.view import Address, ClusterView, MemberStatus, MemberView, NodeLoad, NodeProfile
from nodes.access.api_key import KeySettings, encode_key, new_key
from nodes.access.gate import Gate, LimitReached
from nodes.access.key_book import KeyBook
from nodes.access.limits import Limiter, LostNodes
from nodes.access.usage import UsageLog
from nodes.api.limit_headers import limit_headers
from tests.cluster.figures import finish, law, progress
from tests.unit.fake_peers import FakePeers
from tests.unit.memory_store import MemoryStore

NODES = 4
HOT_KEYS = 10
BUCKET_S = 0.25  # the finest grain of a window
WINDOW_S = 60.0
TOKENS = 16  # of each answer
TELL_S = 0.2  # between two sections told
LIMIT = 10**9
NS_PER_US = 1_000


@dataclass(frozen=True, slots=True)
class Options:
    keys: int = 10_000
    rounds: int = 200
    requests: int = 50
    seed: int = 7


class Subject:
    """A gate with so many keys, none for an open mesh."""

    def __init__(self, keys: int, rng: random.Random, *, requests_per_minute: int = LIMIT) -> None:
        self.now = 1_000.0
        self._told_at = 0.0
        self._replica = Replica("a", 1)
        self._own, self._peers = OwnCounters(1), PeerCounters()
        view = _view()
        lost = LostNodes()
        members = FakePeers("a")
        book = KeyBook(self._replica)
        self.gate = Gate(
            book,
            Limiter(self._own, self._peers, lambda now: lost.shares(view, now)),
            self._own,
            UsageLog(
                MemoryStore(),  # type: ignore[arg-type]
                node_id="a",
                generation=lambda: 1,
                view=lambda: view,
                ask=members.asker_of("a"),
                wall_clock=lambda: 1e9 + self.now,
                rng=rng,
            ),
            is_open=True,
            wait_known=trio.lowlevel.checkpoint,  # what an event that is set costs
            usage_changed=lambda: None,
            wall_clock=lambda: 1e9 + self.now,
            now=lambda: self.now,
        )
        tokens = []
        for number in range(keys):
            key, token = new_key(KeySettings(f"key-{number}", requests_per_minute, LIMIT, LIMIT), 1e9)
            self._replica.merge([self._replica.draft(key.record_id, encode_key(key))])
            tokens.append(token)
        hot = rng.sample(tokens, min(HOT_KEYS, keys))
        self._headers = [f"Bearer {token}" for token in hot] or [""]
        self._families = [token.split("-")[1] for token in hot]
        self._sequence = 0

    async def fill(self) -> None:
        """A minute of use in every bucket of every key in use."""
        for _ in range(int(WINDOW_S / BUCKET_S)):
            for header in self._headers:
                await self.request(header)
            self.hear()
            self.now += BUCKET_S

    def hear(self) -> None:
        """Peers tell of one request more of each key."""
        self._sequence += 1
        count = self._sequence
        for peer in "bcd":
            for family in self._families:
                report = Report(family, Totals(count, 10 * count, 10 * count), 1, 30, 1, 20)
                self._peers.merge(peer, Usage(1, self._sequence, (report,)), self.now)

    def step(self) -> None:
        """Time goes on, outside what is measured."""
        self.now += BUCKET_S
        self.hear()

    async def batch(self, count: int) -> int:
        """CPU of so many requests, ns."""
        headers = [self._headers[i % len(self._headers)] for i in range(count)]
        started = time.thread_time_ns()
        for header in headers:
            await self.request(header)
        if self.now - self._told_at >= TELL_S:
            self._told_at = self.now
            self._own.section(self.now)
        return time.thread_time_ns() - started

    async def request(self, header: str) -> None:
        caller = await self.gate.authenticate(header, "192.0.2.1")
        self.gate.check_model(caller, "m")
        try:
            admission = await self.gate.admit(caller, "m", 20, TOKENS)
        except LimitReached as exc:
            limit_headers(exc.remaining)
            return
        limit_headers(admission.remaining())
        for _ in range(TOKENS):
            admission.generated(1)
        admission.finished(20, TOKENS)
        await admission.aclose()


def _view() -> ClusterView:
    def member(node_id: str) -> MemberView:
        address = Address("127.0.0.1", 1)
        return MemberView(
            node_id, address, MemberStatus.ALIVE, 1, 1, NodeLoad(), NodeProfile(), 0.0, is_self=node_id == "a"
        )

    return ClusterView("a", 0.0, {name: member(name) for name in "abcd"})


async def run(options: Options) -> dict[str, object]:
    rng = random.Random(options.seed)
    progress("making keys")
    subjects = {
        "open": Subject(0, rng),
        "few": Subject(HOT_KEYS, rng),
        "many": Subject(options.keys, rng),
        "refused": Subject(HOT_KEYS, rng, requests_per_minute=1),
    }
    for subject in subjects.values():
        await subject.fill()
    progress("measuring")
    samples: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in _warm_then(options.rounds, samples):
        order = list(subjects)
        rng.shuffle(order)
        for name in order:
            subjects[name].step()
            samples[name].append(await subjects[name].batch(options.requests) / options.requests / NS_PER_US)
    median = {name: statistics.median(values) for name, values in samples.items()}
    ratios = [many / few for many, few in zip(samples["many"], samples["few"], strict=True)]
    return {
        "seed": options.seed,
        "keys": options.keys,
        "rounds": options.rounds,
        "request_us": {name: round(value, 1) for name, value in median.items()},
        "laws": {
            "gate_us": law(median["few"] - median["open"], at_most=200.0),
            "refusal_us": law(median["refused"], at_most=200.0),
            "ten_thousand": law(statistics.median(ratios), at_most=1.10),
        },
    }


def _warm_then(rounds: int, samples: dict[str, list[float]]) -> Iterator[int]:
    """A tenth of the rounds more first, whose samples are thrown away."""
    yield from range(max(1, rounds // 10))
    for values in samples.values():
        values.clear()
    yield from range(rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Options()
    parser.add_argument("--keys", type=int, default=defaults.keys, help="in the large store")
    parser.add_argument("--rounds", type=int, default=defaults.rounds)
    parser.add_argument("--requests", type=int, default=defaults.requests, help="in a batch")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    options = Options(**vars(parser.parse_args()))
    finish(trio.run(run, options))


if __name__ == "__main__":
    main()
