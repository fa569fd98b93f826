"""Gossip measured on real processes, one network namespace a node: ours, and beside it serf where it is installed.

    python -m tests.benchmark.gossip N [--kinds ours,serf] [--only join,idle,...] [--trials 5] [--idle-s 60] ...

Prints one JSON line a measurement. Needs root, `ip` and `nft`; apt: iproute2 nftables serf. Each namespace holds one
agent of each kind, so both live through the same minutes, losses and cuts on the same machine; what acts on one cluster
alone alternates between them. Join and churn, which load the machine, run with one kind after the other.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

import trio

from tests.benchmark.gossip import measurements
from tests.benchmark.gossip.agents import Kind, installed
from tests.benchmark.gossip.cluster import AgentEnded, Cluster
from tests.benchmark.gossip.namespaces import NamespacesUnavailable, Network, network
from tests.benchmark.gossip.rows import Row, print_row

MEASUREMENTS = ("join", "idle", "change", "churn", "kill", "loss", "deaf", "partition")
KILL_ALL_S = 30.0


async def measure(options: argparse.Namespace, kinds: Sequence[Kind], hosts: Network) -> None:
    """Everything asked for, in the order of MEASUREMENTS."""
    wanted = options.only
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_stop_on_signal, nursery.cancel_scope)
        clusters = [Cluster(kind, hosts, nursery) for kind in kinds]
        try:
            for cluster in clusters:
                row = await measurements.join(cluster)
                if "join" in wanted:
                    print_row(cluster.kind.label, hosts.count, "join", row)
            await trio.sleep(measurements.SETTLE_S)
            await _measure_running(options, clusters)
        finally:
            with trio.move_on_after(KILL_ALL_S, shield=True):
                for cluster in clusters:
                    await cluster.kill_all()
        nursery.cancel_scope.cancel()


async def _measure_running(options: argparse.Namespace, clusters: Sequence[Cluster]) -> None:
    wanted, count = options.only, clusters[0].network.count
    if "idle" in wanted:
        for cluster in clusters:
            print_row(cluster.kind.label, count, "idle", await measurements.idle(cluster, options.idle_s))
    if "change" in wanted:
        for cluster in clusters:
            for state in cluster.kind.states:
                row = await measurements.state_change(cluster, state, options.changes)
                print_row(cluster.kind.label, count, "change", row)
    if "churn" in wanted:
        for cluster in clusters:
            print_row(cluster.kind.label, count, "churn", await measurements.churn(cluster, options.churn_s))
            await trio.sleep(measurements.SETTLE_S)
    if "kill" in wanted:
        trials: dict[str, list[dict[int, float]]] = {cluster.kind.label: [] for cluster in clusters}
        for trial in range(options.trials):
            for cluster in clusters:
                trials[cluster.kind.label].append(await measurements.kill_one(cluster, trial))
        for label, detected in trials.items():
            print_row(label, count, "kill", measurements.kill_row(detected, count - 1))
    if "loss" in wanted:
        for percent in options.loss:
            rows = await measurements.loss(clusters, percent / 100, options.loss_s)
            _print_rows(clusters, "loss", rows)
    if "deaf" in wanted:
        _print_rows(clusters, "deaf", await measurements.deaf_to_half(clusters, options.deaf_s))
    if "partition" in wanted:
        _print_rows(clusters, "partition", await measurements.partition(clusters, options.partition_s))


def _print_rows(clusters: Sequence[Cluster], what: str, rows: Sequence[Row]) -> None:
    for cluster, row in zip(clusters, rows, strict=True):
        print_row(cluster.kind.label, cluster.network.count, what, row)


async def _stop_on_signal(scope: trio.CancelScope) -> None:
    """Ctrl-C and SIGTERM end the run in order: agents first, then namespaces."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()
            return


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    available = {kind.label: kind for kind in installed()}
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark.gossip", description="Gossip on real processes")
    parser.add_argument("n", type=int, help="nodes, 3 to 200")
    parser.add_argument("--kinds", default=",".join(available), help="of ours, serf; default: those installed")
    parser.add_argument("--only", default=",".join(MEASUREMENTS), help=f"of {','.join(MEASUREMENTS)}")
    parser.add_argument("--idle-s", type=float, default=60.0)
    parser.add_argument("--changes", type=int, default=10, help="state changes, a few seconds each")
    parser.add_argument("--churn-s", type=int, default=30, help="changes of each node, one a second")
    parser.add_argument("--trials", type=int, default=5, help="SIGKILLs of each kind, about 25 s each")
    parser.add_argument("--loss", default="10,20,30", help="per cent, one after the other")
    parser.add_argument("--loss-s", type=float, default=180.0)
    parser.add_argument("--deaf-s", type=float, default=120.0)
    parser.add_argument("--partition-s", type=float, default=60.0)
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    options.kinds = options.kinds.split(",")
    options.loss = [float(percent) for percent in options.loss.split(",")]
    if options.n < 3:
        parser.error("at least 3 nodes")
    if unknown := set(options.only) - set(MEASUREMENTS):
        parser.error(f"no measurement is called {', '.join(sorted(unknown))}; there are {', '.join(MEASUREMENTS)}")
    if missing := set(options.kinds) - set(available):
        parser.error(f"not installed: {', '.join(sorted(missing))}")
    options.kinds = [available[label] for label in options.kinds]
    return options


def main() -> int:
    options = parse()
    ports = {kind.label: kind.port for kind in options.kinds}
    try:
        with network(options.n, ports) as hosts:
            try:
                trio.run(measure, options, options.kinds, hosts)
            except* AgentEnded as group:
                print(f"cannot measure: {group.exceptions[0]}", file=sys.stderr)
                sys.exit(1)
    except (NamespacesUnavailable, OSError) as exc:
        print(f"cannot measure: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
