"""The measurements of running clusters, each a function that returns the fields of its row. Times in seconds.

A loss or cut acts on the network, so on all kinds of agents in it at once: those functions take several clusters and
return a row for each.
"""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise

import trio

from tests.benchmark.gossip.agents import ChangeRefused, State
from tests.benchmark.gossip.cluster import Cluster, Sighting, What
from tests.benchmark.gossip.namespaces import Traffic
from tests.benchmark.gossip.rows import Row, spread

SEEN_TIMEOUT_S = 60.0  # for one event to reach every node; what has not then is counted as missed
HEAL_TIMEOUT_S = 150.0  # some agents look for lost members each 30 s only
SETTLE_S = 8.0  # after a restart or a fault, so that the next trial starts from rest
CHANGE_BYTES = 200
CHURN_BYTES = 300
CHURN_LATE_S = 0.5  # a node held up for so long by its former change leaves this one out
CHURN_GRACE_S = 3.0  # for the last changes to arrive
EPISODE_S = 30.0  # obituaries of one node within this time are one false death, seen by many


async def join(cluster: Cluster) -> Row:
    """Start node 0, then all others at once, and wait until everybody has seen everybody.

    all_see_all_s: from the start of the processes; beyond_start_s: from when the last of them said that it runs."""
    count = cluster.network.count
    await cluster.wait_running([await cluster.start(0)])
    began = trio.current_time()
    running_at = await cluster.wait_running([await cluster.start(index) for index in range(1, count)])
    is_complete = await cluster.wait_until(lambda: _pairs_joined(cluster) == count * (count - 1), SEEN_TIMEOUT_S)
    done = max((s.at for s in cluster.seen(began, What.JOINED)), default=began)
    return {
        "all_see_all_s": round(done - began, 2) if is_complete else None,
        "processes_started_s": round(running_at - began, 2),
        "beyond_start_s": round(max(0.0, done - running_at), 2) if is_complete else None,
        "pairs_missed": count * (count - 1) - _pairs_joined(cluster),
    }


async def idle(cluster: Cluster, duration_s: float) -> Row:
    """Packets, bytes and CPU time per node while nothing happens."""
    meter = await Meter.start(cluster)
    await trio.sleep(duration_s)
    return await meter.row()


async def state_change(cluster: Cluster, state: State, trials: int) -> Row:
    """The last node changes its state; how long until each other node has seen it."""
    subject = cluster.network.count - 1
    reached: list[dict[int, float]] = []
    for trial in range(trials):
        text = f"{trial}-".ljust(CHANGE_BYTES, "y")
        began = trio.current_time()
        await cluster.change(subject, state, text)
        seen = partial(cluster.first_seen, began, What.UPDATED, subject)
        await cluster.wait_until(lambda seen=seen: len(seen()) == subject, SEEN_TIMEOUT_S)  # type: ignore[misc]
        reached.append(seen())
        # Never in step with anything that happens each second.
        await trio.sleep(2.0 + 0.137 * (trial % 7))
    return {
        "state": str(state),
        "each_node_s": spread(delay for delays in reached for delay in delays.values()),
        "last_node_s": spread(max(delays.values()) for delays in reached if delays),
        "missed": sum(subject - len(delays) for delays in reached),
    }


async def churn(cluster: Cluster, rounds: int) -> Row:
    """Every node changes CHURN_BYTES of its state each second; which of these updates its peers see, and how often.

    updates_seen_fraction: of all that were asked for. A change that the agent holds up is one that nobody can see."""
    count = cluster.network.count
    began = trio.current_time()
    made = refused = 0

    async def keep_changing(index: int) -> None:
        nonlocal made, refused
        rng = random.Random(index)
        for turn in range(rounds):
            due = began + index / count + turn
            if trio.current_time() > due + CHURN_LATE_S:
                continue
            await trio.sleep_until(due)
            try:
                await cluster.change(index, State.LOAD, rng.randbytes(CHURN_BYTES // 2).hex())
                made += 1
            except (ChangeRefused, trio.TooSlowError):
                refused += 1

    meter = await Meter.start(cluster)
    began = trio.current_time()
    with trio.move_on_after(rounds + CHURN_GRACE_S):
        async with trio.open_nursery() as nursery:
            for index in range(count):
                nursery.start_soon(keep_changing, index)
    row = await meter.row()
    await trio.sleep(CHURN_GRACE_S)
    ended = trio.current_time()
    await _shrink(cluster)
    by_pair: dict[tuple[int, int], list[float]] = {}
    for sighting in cluster.seen(began, What.UPDATED):
        if sighting.at <= ended:
            by_pair.setdefault((sighting.observer, sighting.subject), []).append(sighting.at)
    gaps = [later - at for times in by_pair.values() for at, later in pairwise(times)]
    return {
        "updates_seen_fraction": round(sum(map(len, by_pair.values())) / (count * (count - 1) * rounds), 4),
        "changes_made_fraction": round(made / (count * rounds), 4),
        "changes_refused": refused,
        "gap_s": spread(gaps),
        **row,
    }


async def _shrink(cluster: Cluster) -> None:
    """Small states again: what is measured next is not to carry those of the churn."""
    async with trio.open_nursery() as nursery:
        for index in cluster.agents:
            nursery.start_soon(_change_or_not, cluster, index)


async def _change_or_not(cluster: Cluster, index: int) -> None:
    with suppress(ChangeRefused, trio.TooSlowError):
        await cluster.change(index, State.LOAD, "at rest")


async def kill_one(cluster: Cluster, trial: int) -> dict[int, float]:
    """SIGKILL a node and start it again. By other node, how long until it called the killed one failed."""
    subject = 1 + (trial * 7) % (cluster.network.count - 1)
    await trio.sleep(0.37 * (trial % 3))
    killed_at = await cluster.kill(subject)
    others = set(cluster.agents)
    await cluster.wait_until(
        lambda: len(cluster.first_seen(killed_at, What.FAILED, subject)) == len(others), SEEN_TIMEOUT_S
    )
    detected = cluster.first_seen(killed_at, What.FAILED, subject)
    began = trio.current_time()
    await cluster.wait_running([await cluster.start(subject)])
    await cluster.wait_until(
        lambda: len(cluster.first_seen(began, What.JOINED, subject)) == len(others), SEEN_TIMEOUT_S
    )
    await trio.sleep(SETTLE_S)
    return detected


def kill_row(trials: Sequence[dict[int, float]], other_count: int) -> Row:
    return {
        "trials": len(trials),
        "each_node_s": spread(delay for delays in trials for delay in delays.values()),
        "first_node_s": spread(min(delays.values()) for delays in trials if delays),
        "last_node_s": spread(max(delays.values()) for delays in trials if delays),
        "missed": sum(other_count - len(delays) for delays in trials),
    }


async def loss(clusters: Sequence[Cluster], share: float, duration_s: float) -> list[Row]:
    """Every node loses this share of what comes in. All are alive, so each obituary is false."""
    network = clusters[0].network
    await network.set_faults_everywhere(loss=share)
    try:
        meters = [await Meter.start(cluster) for cluster in clusters]
        await trio.sleep(duration_s)
        rows = [
            {"loss": share, **false_deaths(c, m.began), **await m.row()} for c, m in zip(clusters, meters, strict=True)
        ]
    finally:
        with trio.move_on_after(network.count, shield=True):
            await network.set_faults_everywhere()
    await trio.sleep(2 * SETTLE_S)
    return rows


async def deaf_to_half(clusters: Sequence[Cluster], duration_s: float) -> list[Row]:
    """Node 1 does not hear half of the others, which hear it."""
    network = clusters[0].network
    unheard = range(2, 2 + (network.count - 2) // 2)
    await network.set_faults(1, deaf_to=unheard)
    began = trio.current_time()
    try:
        await trio.sleep(duration_s)
        rows = [{"deaf_to": len(unheard), **false_deaths(c, began)} for c in clusters]
    finally:
        with trio.move_on_after(SETTLE_S, shield=True):
            await network.set_faults(1)
    await trio.sleep(2 * SETTLE_S)
    return rows


async def partition(clusters: Sequence[Cluster], duration_s: float) -> list[Row]:
    """Half of the nodes do not hear the other half for a while, and the reverse. How long until all see all again.

    healed_s: since the cut was lifted whole; None where some pair had not met again after HEAL_TIMEOUT_S."""
    network = clusters[0].network
    half = network.count // 2
    sides = (range(half), range(half, network.count))
    began = trio.current_time()
    try:
        for index in range(network.count):
            await network.set_faults(index, deaf_to=sides[index < half])
        await trio.sleep(duration_s)
        # Looked at before the cut is lifted: that takes a moment, and pairs meet as soon as their own rules are gone.
        ended = trio.current_time()
        parted = [_lost_pairs(cluster, began) for cluster in clusters]
    finally:
        with trio.move_on_after(network.count, shield=True):
            await network.set_faults_everywhere()
    lifted_at = trio.current_time()
    with trio.move_on_after(HEAL_TIMEOUT_S):
        for cluster in clusters:
            await cluster.wait_until(lambda c=cluster: not _lost_pairs(c, began), HEAL_TIMEOUT_S)  # type: ignore[misc]
    rows: list[Row] = []
    for cluster, pairs in zip(clusters, parted, strict=True):
        left = _lost_pairs(cluster, began)
        met = [max(0.0, s.at - lifted_at) for s in cluster.seen(ended, What.JOINED) if (s.observer, s.subject) in pairs]
        rows.append(
            {
                "parted_s": round(ended - began, 1),
                "pairs_parted": len(pairs),
                "healed_s": None if left else round(max(met, default=0.0), 2),
                "pair_healed_s": spread(met),
                "pairs_left": len(left),
            }
        )
    await trio.sleep(2 * SETTLE_S)
    return rows


def false_deaths(cluster: Cluster, since: float) -> Row:
    """Obituaries of the living. views: each by each observer; deaths: each node once in EPISODE_S."""
    views = cluster.seen(since, What.FAILED)
    hours = cluster.network.count * (trio.current_time() - since) / 3600
    deaths = episodes(views)
    return {
        "false_deaths": deaths,
        "false_deaths_per_node_hour": round(deaths / hours, 2),
        "false_death_views": len(views),
        "suspicion_views_per_node_hour": round(len(cluster.seen(since, What.SUSPECTED)) / hours, 1),
        "duration_s": round(trio.current_time() - since, 1),
    }


class Meter:
    """What the nodes of a cluster sent and computed since it was started."""

    def __init__(self, cluster: Cluster, traffic: dict[int, Traffic], cpu_s: dict[int, float]) -> None:
        self.began = trio.current_time()
        self._cluster = cluster
        self._traffic = traffic
        self._cpu_s = cpu_s

    @classmethod
    async def start(cls, cluster: Cluster) -> Meter:
        return cls(cluster, await _traffic(cluster), cluster.cpu_s())

    async def row(self) -> Row:
        # The counters are read one namespace after the other, in the same order as at the start.
        duration_s = trio.current_time() - self.began
        cpu = self._cluster.cpu_s()
        traffic = await _traffic(self._cluster)
        sent = [(traffic[i].packets_out - was.packets_out) / duration_s for i, was in self._traffic.items()]
        sent_bytes = [(traffic[i].bytes_out - was.bytes_out) / duration_s for i, was in self._traffic.items()]
        received_bytes = [(traffic[i].bytes_in - was.bytes_in) / duration_s for i, was in self._traffic.items()]
        return {
            "packets_out_per_node_s": round(statistics.mean(sent), 1),
            "bytes_out_per_node_s": round(statistics.mean(sent_bytes)),
            "bytes_in_per_node_s": round(statistics.mean(received_bytes)),
            "bytes_out_per_node_s_max": round(max(sent_bytes)),
            "cpu_s_per_node_minute": round(
                60 * statistics.mean((cpu[i] - was) / duration_s for i, was in self._cpu_s.items()), 3
            ),
            "load_average": round(os.getloadavg()[0], 1),
        }


async def _traffic(cluster: Cluster) -> dict[int, Traffic]:
    return {index: await cluster.network.traffic(index, cluster.kind.label) for index in cluster.agents}


def _pairs_joined(cluster: Cluster) -> int:
    return len({(s.observer, s.subject) for s in cluster.sightings if s.what is What.JOINED})


def _lost_pairs(cluster: Cluster, since: float) -> set[tuple[int, int]]:
    """Who calls whom failed, as last said."""
    lost: set[tuple[int, int]] = set()
    for sighting in cluster.seen(since, What.FAILED, What.JOINED):
        pair = (sighting.observer, sighting.subject)
        (lost.add if sighting.what is What.FAILED else lost.discard)(pair)
    return lost


def episodes(views: Sequence[Sighting]) -> int:
    """How many deaths the obituaries tell of, however many nodes tell of each. views: oldest first."""
    count = 0
    latest: dict[int, float] = {}
    for view in views:
        if view.at - latest.get(view.subject, float("-inf")) > EPISODE_S:
            count += 1
        latest[view.subject] = view.at
    return count
