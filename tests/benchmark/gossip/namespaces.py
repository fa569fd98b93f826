"""Network namespaces on one bridge: a host for each node, with packet counters, loss and cuts that can be set.

Nothing of the machine's own network is touched. Needs root, `ip` (iproute2) and, for counters and loss, `nft`.
Names start with the process id of who made them, so runs do not meet, and what a killed run left is found and removed.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import trio

PREFIX = "gossipbench"
NODES_MAX = 200  # the ARP entries of all namespaces are the kernel's: n^2 of them
PER_MILLE = 1000
CLONE_NEWNET = 0x40000000  # linux/sched.h
TABLE = "bench"
COMMAND_TIMEOUT_S = 30.0
NOBODY = "02:00:00:00:00:01"  # no interface has this hardware address


class NamespacesUnavailable(Exception):
    """The machine lacks what namespaces need; the message says what."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Packets and IP bytes since the namespace was made."""

    packets_in: int
    bytes_in: int
    packets_out: int
    bytes_out: int


def check_machine(*tools: str) -> None:
    """Raises NamespacesUnavailable."""
    if os.geteuid() != 0:
        raise NamespacesUnavailable("network namespaces need root")
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        raise NamespacesUnavailable(f"{' and '.join(missing)} not found: install iproute2 and nftables")


class Network:
    """count hosts on one bridge. ports: by label, counted separately; loss and deafness hold for all of them. Without
    any there are no counters, and only divide() makes faults."""

    def __init__(self, count: int, ports: dict[str, int]) -> None:
        if not 1 <= count <= NODES_MAX:
            raise ValueError(f"{count} nodes; 1 to {NODES_MAX} are possible")
        self.count = count
        self._ports = ports
        self._prefix = f"{PREFIX}{os.getpid()}"
        self._hub = f"{self._prefix}-hub"

    def host(self, index: int) -> str:
        return f"10.77.{index // 200}.{index % 200 + 1}"

    def inside(self, index: int, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` as a process of that host; its pid is the command's own."""
        return ["ip", "netns", "exec", self._name(index), *command]

    def create(self) -> None:
        """Make them, and bring the calling thread onto the bridge, so that its sockets reach every host."""
        remove_leftovers()
        # Setting limits of the kernel that no namespace has for itself; too small ones lose packets at n > 30.
        for limit, entries in (("gc_thresh1", 8192), ("gc_thresh2", 32768), ("gc_thresh3", 65536)):
            with suppress(OSError):
                path = Path("/proc/sys/net/ipv4/neigh/default", limit)
                if int(path.read_text()) < entries:
                    path.write_text(str(entries))
        _ip([f"netns add {self._hub}"])
        bridge = ["link add bridge type bridge", "addr add 10.77.255.254/16 dev bridge", "link set bridge up"]
        _ip(["link set lo up", *bridge], self._hub)
        for index in range(self.count):
            name = self._name(index)
            _ip([f"netns add {name}"])
            _ip([f"link add node{index} type veth peer name eth0 netns {name}"], self._hub)
            _ip([f"link set node{index} master bridge up"], self._hub)
            _ip(["link set lo up", f"addr add {self.host(index)}/16 dev eth0", "link set eth0 up"], name)
            if self._ports:
                _run(["ip", "netns", "exec", name, "nft", "-f", "-"], self._table())
        self._enter()

    def remove(self) -> None:
        """Delete all of them, with what still runs inside. Any number of times."""
        _remove(self._prefix)

    def _enter(self) -> None:
        with open(f"/run/netns/{self._hub}") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter {self._hub}")

    async def set_faults(self, index: int, *, loss: float = 0.0, deaf_to: Iterable[int] = ()) -> None:
        """What this host loses of what comes in: a share at random (0 to 1), and all from some hosts."""
        rules = []
        for port in self._ports.values():
            share = f"numgen random mod {PER_MILLE} < {round(loss * PER_MILLE)} drop"
            if loss:
                rules += [f"meta l4proto {{ tcp, udp }} th dport {port} {share}", f"tcp sport {port} {share}"]
        blocked = ", ".join(self.host(i) for i in deaf_to)
        if blocked:
            rules.append(f"ip saddr {{ {blocked} }} meta l4proto {{ tcp, udp }} drop")
        script = f"flush chain inet {TABLE} faults\n" + "".join(f"add rule inet {TABLE} faults {r}\n" for r in rules)
        await trio.run_process(self.inside(index, ["nft", "-f", "-"]), stdin=script.encode(), start_new_session=True)

    async def set_faults_everywhere(self, *, loss: float = 0.0) -> None:
        for index in range(self.count):
            await self.set_faults(index, loss=loss)

    def divide(self, *sides: Sequence[int]) -> None:
        """Hosts of different sides no longer reach each other: what they send is lost without a word. The calling
        thread reaches all. One side, or none, ends it."""
        side_of = {index: number for number, side in enumerate(sides) for index in side}
        for index in range(self.count):
            beyond = [other for other in range(self.count) if side_of.get(other) != side_of.get(index)]
            commands = ["neigh flush dev eth0 nud permanent"]
            commands += [f"neigh replace {self.host(o)} lladdr {NOBODY} dev eth0 nud permanent" for o in beyond]
            _ip(commands, self._name(index))

    async def traffic(self, index: int, label: str) -> Traffic:
        command = self.inside(index, ["nft", "-j", "list", "counters", "table", "inet", TABLE])
        finished = await trio.run_process(command, capture_stdout=True, start_new_session=True)
        counters = {
            row["counter"]["name"]: row["counter"]
            for row in json.loads(finished.stdout)["nftables"]
            if "counter" in row
        }
        into, out = counters[f"{label}_in"], counters[f"{label}_out"]
        return Traffic(into["packets"], into["bytes"], out["packets"], out["bytes"])

    def _name(self, index: int) -> str:
        return f"{self._prefix}-{index}"

    def _table(self) -> str:
        """Counted before it is lost. TCP has the port at either end, UDP at both."""
        counters, into, out = "", "", ""
        for label, port in self._ports.items():
            counters += f"counter {label}_in {{ }}\ncounter {label}_out {{ }}\n"
            for name, way in ((f"{label}_in", "into"), (f"{label}_out", "out")):
                rules = f"meta l4proto {{ tcp, udp }} th dport {port} counter name {name}\n"
                rules += f"tcp sport {port} counter name {name}\n"
                into, out = (into + rules, out) if way == "into" else (into, out + rules)
        return (
            f"table inet {TABLE} {{\n{counters}chain faults {{ }}\n"
            f"chain into {{ type filter hook input priority 0;\n{into}jump faults\n}}\n"
            f"chain out {{ type filter hook output priority 0;\n{out}}}\n}}\n"
        )


@contextmanager
def network(count: int, ports: dict[str, int]) -> Iterator[Network]:
    """A Network that is gone afterwards, also after an exception. Raises NamespacesUnavailable, OSError."""
    check_machine("ip", *(("nft",) if ports else ()))
    made = Network(count, ports)
    try:
        with _signals_wait():
            made.create()
        yield made
    finally:
        with _signals_wait():
            made.remove()


@contextmanager
def _signals_wait() -> Iterator[None]:
    """A signal must not leave half of the namespaces, made or removed: it is taken note of afterwards."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def remove_leftovers() -> None:
    """Remove what runs left that were killed: namespaces named after a process that is no more."""
    for process_id in {int(found[1]) for name in _names() if (found := re.match(rf"{PREFIX}(\d+)-", name))}:
        if not Path(f"/proc/{process_id}").exists():
            _remove(f"{PREFIX}{process_id}")


def _remove(prefix: str) -> None:
    for name in _names():
        if not name.startswith(f"{prefix}-"):
            continue
        for process_id in _run(["ip", "netns", "pids", name]).split():
            if int(process_id) != os.getpid():
                with suppress(ProcessLookupError):
                    os.kill(int(process_id), signal.SIGKILL)
        _run(["ip", "netns", "del", name])


def _names() -> list[str]:
    try:
        return sorted(os.listdir("/run/netns"))
    except FileNotFoundError:
        return []  # nobody has made one since the machine started


def _ip(commands: Sequence[str], namespace: str = "") -> None:
    _run(["ip", *(("-n", namespace) if namespace else ()), "-batch", "-"], "\n".join(commands))


def _run(command: Sequence[str], text: str = "") -> str:
    """Its output. Raises OSError with what it complained of."""
    done = subprocess.run(
        command,
        input=text,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        start_new_session=True,
        check=False,
    )
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
