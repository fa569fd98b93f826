"""CPU time of one node in an idle mesh of 100: one real process, and 99 simulated peers on loopback in another.

    python -m tests.benchmark.gossip.cpu [--peers 99] [--warm-up-s 20] [--duration-s 60] [--serve]

prints one JSON line: the real node's CPU time as a share of one core, read from /proc, beside what a single process
that drives all peers takes. By default the real node is the benchmark's agent; with --serve it is `ai-cluster serve
--no-model`, HTTP and the reading of its own load included. Peers keep still: each publishes the same load each second,
as gossip does. Their cores are the production one; only their sockets are read by one loop. Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from heapq import heapify, heappop, heappush
from pathlib import Path

import trio

from mesh.gossip import Effect, ExchangeState, Gossip, GossipConfig, PingLink, SendDatagram
from mesh.seal import BOOT_ID_BYTES, Keyring, parse_key
from mesh.udp import READ_BYTES, address_of, bind
from mesh.view import Address, MemberStatus, ModelInfo, NodeProfile
from tests.benchmark.gossip.agent import load_of
from tests.benchmark.gossip.agents import KEY

LOAD = load_of("x" * 60)  # one model
PROFILE = NodeProfile("127.0.0.1:8080", "0.1.0", (ModelInfo("demo", "ab" * 16, 2048, 8),))
DRAIN_MAX = 64
JOIN_TIMEOUT_S = 120.0
PORT_TRIES = 20


class MeshNotFormed(Exception):
    """The nodes did not come to see each other; the message says what to do."""


class Peers:
    """Cores of peers on loopback sockets of their own, all run by one loop. Their links always answer."""

    def __init__(self, count: int, seed: int) -> None:
        rng = random.Random(seed)
        now = trio.current_time()
        keyring = Keyring([parse_key(KEY)])
        self.sockets = [bind("127.0.0.1", 0) for _ in range(count)]
        first = address_of(self.sockets[0])
        self.cores: list[Gossip] = []
        for index, bound in enumerate(self.sockets):
            bound.setblocking(False)
            seeds = (first,) if index else ()
            boot_id = rng.randbytes(BOOT_ID_BYTES)
            core = Gossip(
                GossipConfig(), f"peer{index}", 1, address_of(bound), seeds, keyring, boot_id, random.Random(index), now
            )
            core.set_load(LOAD, now)
            core.set_profile(PROFILE, now)
            self.cores.append(core)
        self._index_of = {address_of(bound): index for index, bound in enumerate(self.sockets)}
        self._due = [(now, index) for index in range(count)]
        heapify(self._due)
        self._due_at = [now] * count

    def close(self) -> None:
        for bound in self.sockets:
            bound.close()

    def deaths_and_stalls(self) -> tuple[int, int]:
        """Declared and gone through by all of them so far: any says that the machine was too busy to measure."""
        counts = [core.statistics() for core in self.cores]
        return sum(c.deaths for c in counts), sum(c.stalls for c in counts)

    async def run(self) -> None:
        """Until cancelled. One task reads a socket when it is readable; one runs what is due."""
        async with trio.open_nursery() as nursery:
            for index, bound in enumerate(self.sockets):
                nursery.start_soon(self._read, index, bound)
            while True:
                now = trio.current_time()
                while self._due and self._due[0][0] <= now:
                    at, index = heappop(self._due)
                    if at == self._due_at[index]:
                        self._perform(index, self.cores[index].tick(now), now)
                await trio.sleep_until(min(self._due[0][0], now + 0.02))

    async def _read(self, index: int, bound: socket.socket) -> None:
        core = self.cores[index]
        while True:
            await trio.lowlevel.wait_readable(bound)
            for _ in range(DRAIN_MAX):
                try:
                    data, source = bound.recvfrom(READ_BYTES)
                except BlockingIOError:
                    break
                now = trio.current_time()
                self._perform(index, core.receive(data, Address(source[0], source[1]), now), now)

    def _perform(self, index: int, effects: Sequence[Effect], now: float) -> None:
        core = self.cores[index]
        for effect in effects:
            if isinstance(effect, SendDatagram):
                try:
                    self.sockets[index].sendto(effect.data, (effect.address.host, effect.address.port))
                except OSError:
                    continue  # a full buffer: lost, as datagrams may be
            elif isinstance(effect, PingLink):
                core.link_answered(effect.node_id, now)
            elif isinstance(effect, ExchangeState):
                self._exchange(index, effect, now)
        due = core.next_wakeup()
        if due != self._due_at[index]:
            self._due_at[index] = due
            heappush(self._due, (due, index))

    def _exchange(self, index: int, effect: ExchangeState, now: float) -> None:
        """Among the peers a call; the real node is not asked."""
        core = self.cores[index]
        asked = self._index_of.get(effect.address)
        if asked is None:
            core.exchange_failed(effect.node_id)
        else:
            answer = self.cores[asked].answer_exchange(effect.question, now)
            self._perform(index, core.take_exchange(effect.node_id, answer, now), now)


@contextmanager
def real_node(seed: Address, *, is_served: bool) -> Iterator[subprocess.Popen[bytes]]:
    """The process under measurement, joined to the mesh through `seed`; killed afterwards."""
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="gossip-cpu-") as folder:
        if is_served:
            key_file = Path(folder, "key")
            key_file.write_text(KEY)
            key_file.chmod(0o600)
            options = ["--no-model", "--name", "real", "--http", "127.0.0.1:0", "--mesh", f"127.0.0.1:{port}"]
            options += ["--join", str(seed), "--cluster-key-file", str(key_file)]
            options += ["--data-dir", str(Path(folder, "data")), "--log-dir", str(Path(folder, "logs"))]
            command = [sys.executable, "-m", "nodes.cli", "serve", *options]
        else:
            module = "tests.benchmark.gossip.agent"
            command = [sys.executable, "-m", module, "real", f"127.0.0.1:{port}", str(seed), KEY, "unwatched"]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _free_port() -> int:
    """Free for UDP and TCP on loopback. Raises OSError."""
    for _ in range(PORT_TRIES):
        port = random.SystemRandom().randrange(20_000, 32_000)
        try:
            with bind("127.0.0.1", port), socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:
            continue
    raise OSError(f"no port of {PORT_TRIES} drawn is free")


def cpu_s(process_id: int) -> float:
    """User and system time so far (proc(5), fields 14 and 15)."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(options: argparse.Namespace) -> None:
    peers = Peers(options.peers, seed=options.seed)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peers.run)
            with real_node(address_of(peers.sockets[0]), is_served=options.serve) as process:
                with trio.move_on_after(JOIN_TIMEOUT_S) as joining:
                    while not _all_know_all(peers):
                        await trio.sleep(0.5)
                if joining.cancelled_caught:
                    raise MeshNotFormed(
                        f"{options.peers} peers and the node did not all see each other within {JOIN_TIMEOUT_S:g} s: "
                        f"the machine is too busy, or the node did not start; try fewer --peers"
                    )
                await trio.sleep(options.warm_up_s)
                began, before, own_before = trio.current_time(), cpu_s(process.pid), cpu_s(os.getpid())
                deaths_before, stalls_before = peers.deaths_and_stalls()
                await trio.sleep(options.duration_s)
                duration_s = trio.current_time() - began
                deaths, stalls = peers.deaths_and_stalls()
                row = {
                    "what": "cpu of one node, mesh idle",
                    "node": "serve --no-model" if options.serve else "agent",
                    "n": options.peers + 1,
                    "duration_s": round(duration_s, 1),
                    "cpu_percent_of_a_core": round(100 * (cpu_s(process.pid) - before) / duration_s, 2),
                    "peers_cpu_percent": round(100 * (cpu_s(os.getpid()) - own_before) / duration_s, 1),
                    "peer_stalls": stalls - stalls_before,
                    "deaths": deaths - deaths_before,
                    "load_average": round(os.getloadavg()[0], 1),
                }
                print(json.dumps(row), flush=True)
            nursery.cancel_scope.cancel()
    finally:
        peers.close()


def _all_know_all(peers: Peers) -> bool:
    now = trio.current_time()
    views = [core.view(now).members for core in peers.cores]
    return all(
        len(view) == len(peers.cores) + 1 and all(m.status <= MemberStatus.SUSPECT for m in view.values())
        for view in views
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmark.gossip.cpu", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--peers", type=int, default=99)
    parser.add_argument("--warm-up-s", type=float, default=20.0)
    parser.add_argument("--duration-s", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="of the peers' boot ids")
    parser.add_argument("--serve", action="store_true", help="measure a whole node instead of the agent")
    try:
        trio.run(measure, parser.parse_args())
    except* MeshNotFormed as group:
        sys.exit(str(group.exceptions[0]))


if __name__ == "__main__":
    main()
