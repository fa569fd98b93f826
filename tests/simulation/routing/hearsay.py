"""What entries know of the other nodes: production gossip cores in virtual time, and loads that ride on peer links.

A node takes its load ten times a second and its digest each DIGEST_INTERVAL_S, as nodes/node.py does, and gossip
decides what becomes of them: in the simulated mesh of tests.simulation, with its delays. Where an entry has answers
running on a node, that node's load rides on their events, and on the answer to a ping where none come, as
mesh/link_connection.py has it."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from mesh.prefix_digests import DIGEST_INTERVAL_S, encode_digest
from mesh.view import ClusterView, NodeLoad, NodeProfile
from tests.simulation.shortcuts import rare_collections, shared_decoding
from tests.simulation.world import World as GossipWorld

SETTLE_S = 10.0  # of gossip before the first request, for all to have met
JOIN_SPREAD_S = 1.0
LOAD_INTERVAL_S = 0.1  # as nodes/node.py and mesh/link_connection.py have it
PING_TICKS = 5  # of LOAD_INTERVAL_S between two pings of a link

# Of a world: when, and what then.
Schedule = Callable[[float, Callable[[], None]], None]


class Hearsay:
    """names: of the nodes, by number. load(node): its load now. conversations(node): what it has cached, by model.
    decoding(node), open_at(node): entries whose answers make tokens there, and those that have any there."""

    def __init__(
        self,
        count: int,
        seed: int,
        profile: NodeProfile,
        *,
        load: Callable[[int], NodeLoad],
        conversations: Callable[[int], dict[str, list[tuple[int, ...]]]],
        decoding: Callable[[int], Collection[int]],
        open_at: Callable[[int], Collection[int]],
    ) -> None:
        self._gossip = GossipWorld(seed)
        self.names = self._gossip.add(count, spread_s=JOIN_SPREAD_S)
        self._profile = profile
        self._load = load
        self._conversations = conversations
        self._decoding = decoding
        self._open_at = open_at
        self._rng = random.Random(f"{seed}|hearsay")

    @contextmanager
    def settled(self, at: Schedule) -> Iterator[None]:
        """Run it up to time 0 and schedule what nodes do from then on; while inside, cores share their decoding."""
        with shared_decoding(), rare_collections(len(self.names)):
            self._gossip.run_for(JOIN_SPREAD_S + 1.0)
            for name in self.names:
                self._gossip.set_profile(name, self._profile)
            self._gossip.run_until(SETTLE_S)
            for node in range(len(self.names)):
                start = self._rng.random()
                at(start * LOAD_INTERVAL_S, partial(self._tick, node, start * LOAD_INTERVAL_S, 0, at))
                at(start * DIGEST_INTERVAL_S, partial(self._digest, node, start * DIGEST_INTERVAL_S, at))
            yield

    def view(self, entry: int, now: float) -> ClusterView:
        """The cluster as the entry sees it, its own row as of now."""
        self._gossip.run_until(SETTLE_S + now)
        self._gossip.set_load(self.names[entry], self._load(entry))
        return self._gossip.view(self.names[entry])

    def _tick(self, node: int, now: float, tick: int, at: Schedule) -> None:
        self._gossip.run_until(SETTLE_S + now)
        load = self._load(node)
        self._gossip.set_load(self.names[node], load)
        load = replace(load, after_version=self._gossip.nodes[self.names[node]].core.own_version)
        for entry in self._decoding(node) if tick % PING_TICKS else self._open_at(node):
            if entry != node:
                observer = self._gossip.nodes[self.names[entry]]
                observer.core.observe_load(self.names[node], load, observer.clock(self._gossip.now))
        due = now + LOAD_INTERVAL_S
        at(due, partial(self._tick, node, due, tick + 1, at))

    def _digest(self, node: int, now: float, at: Schedule) -> None:
        self._gossip.run_until(SETTLE_S + now)
        self._gossip.set_bulk(self.names[node], encode_digest(self._conversations(node)))
        due = now + DIGEST_INTERVAL_S
        at(due, partial(self._digest, node, due, at))
