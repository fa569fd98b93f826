"""Our agent in gossip benchmarks: the mesh of a production node without engine and HTTP, spoken to in lines.

    python -m tests.benchmark.gossip.agent NAME HOST:PORT SEED|- KEY [unwatched]

NAME without spaces; KEY as `ai-cluster keyring new` prints it. On stdout it says what serf's agent would log:
`EventMemberJoin: NAME ADDRESS`, and likewise EventMemberUpdate, EventMemberFailed, EventMemberLeave, `Suspect NAME has
failed`, `received event: user-event: NAME`. Unwatched, it says nothing of changed loads, which costs time to see.
It obeys lines on stdin, and ends where stdin does:

    load TEXT      publish another load, whose hot section takes about as many bytes as TEXT and whose queues jump
    profile TEXT   publish another profile, whose warm section holds TEXT, at most 600 bytes
    tags TEXT      load TEXT, for drivers that know serf's words alone
    event TEXT     publish a profile that names TEXT up to the first "|"
"""

from __future__ import annotations

import os
import random
import secrets
import socket
import sys
import time
from functools import partial

import trio

from mesh import state_exchange
from mesh.forwarder import Forwarder
from mesh.gossip import Effect, Gossip, GossipConfig, MemberChanged
from mesh.seal import BOOT_ID_BYTES, Keyring, parse_key
from mesh.udp import GossipSocket, bind
from mesh.view import Address, MemberStatus, MemberView, ModelInfo, ModelLoad, NodeLoad, NodeProfile, Readiness

RUNNING = "agent running"  # said once both sockets are bound and served
MODEL_BYTES = 59  # one model's row in a hot section, with counts and rates of five bytes each
LOAD_BYTES = 14  # the hot section without its models
LINE_BYTES_MAX = 65_536
EVENT_PREFIX = "event "
NAME_CHARS = 200  # of a profile's text in one of its fields


def load_of(text: str) -> NodeLoad:
    """A load of about len(text) bytes, another one for each text: all its queues jump, so it is urgent news."""
    rng = random.Random(text)
    count = max(1, round((len(text) - LOAD_BYTES) / MODEL_BYTES))

    def number() -> int:
        return rng.randrange(2**16, 2**32)

    models = {
        f"m{i}": ModelLoad(
            active=number(),
            queued=number(),
            free_slots=number(),
            prefill_rate=rng.random(),
            decode_rate=rng.random(),
            step_count=number(),
            queued_tokens=number(),
            step_s=rng.random(),
            wait_s=rng.random(),
            prompt_token_s=rng.random(),
            answer_tokens=rng.random(),
        )
        for i in range(count)
    }
    return NodeLoad(Readiness.READY, 0, rng.random(), 0.0, models)


def profile_of(text: str) -> NodeProfile:
    """A profile that holds the text."""
    chunks = [text[at : at + NAME_CHARS] for at in range(NAME_CHARS, len(text), NAME_CHARS)]
    models = tuple(ModelInfo(chunk, "", 2048, 8) for chunk in chunks)
    return NodeProfile(version=text[:NAME_CHARS], models=models)


def say(line: str) -> None:
    """One line on stdout at once; blocks while the reader is behind."""
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


class LoadWatch:
    """Says whose load is another one than before. A repeated publication of the same load is no update."""

    def __init__(self) -> None:
        self._versions: dict[str, int] = {}
        self._loads: dict[str, NodeLoad] = {}

    def look(self, members: dict[str, MemberView]) -> list[MemberView]:
        """Those whose load changed since the last look; not whoever is new."""
        changed = []
        for node_id, member in members.items():
            if self._versions.get(node_id) == member.load_version or member.is_self:
                continue
            former = self._loads.get(node_id)
            self._versions[node_id], self._loads[node_id] = member.load_version, member.load
            if former is not None and former != member.load:
                changed.append(member)
        return changed


class WatchedGossip(Gossip):
    """A Gossip that says each changed load as soon as the datagram that holds it is taken in.

    Looking costs a view for each datagram, which counts as the agent's own CPU time."""

    watch: LoadWatch | None = None

    def receive(self, datagram: bytes, source: Address, now: float) -> list[Effect]:
        effects = super().receive(datagram, source, now)
        if self.watch is not None:
            for member in self.watch.look(dict(self.view(now).members)):
                say(f"EventMemberUpdate: {member.node_id} {member.address}")
        return effects


def say_change(change: MemberChanged) -> None:
    """A change of membership or profile in serf's words. Loads are said by WatchedGossip."""
    before, after = change.before, change.after
    was = None if before is None else before.status
    named = f"{after.node_id} {after.address}"
    if after.status is MemberStatus.ALIVE and was not in (MemberStatus.ALIVE, MemberStatus.SUSPECT):
        say(f"EventMemberJoin: {named}")
    elif after.status is MemberStatus.SUSPECT and was is not after.status:
        say(f"Suspect {after.node_id} has failed, nothing heard for {after.age_s:.1f} s")
    elif after.status is MemberStatus.DEAD and was is not after.status:
        say(f"EventMemberFailed: {named}")
    elif after.status is MemberStatus.LEFT and was is not after.status:
        say(f"EventMemberLeave: {named}")
    if before is None or before.profile == after.profile or before.generation != after.generation:
        return
    if after.profile.version.startswith(EVENT_PREFIX):
        say(f"received event: user-event: {after.profile.version.removeprefix(EVENT_PREFIX)}")
    else:
        say(f"EventMemberUpdate: {named}")


def obey(line: str, gossip_socket: GossipSocket) -> None:
    command, _, text = line.strip().partition(" ")
    if command in ("load", "tags"):
        gossip_socket.set_load(load_of(text))
    elif command == "profile":
        gossip_socket.set_profile(profile_of(text))
    elif command == "event":
        gossip_socket.set_profile(NodeProfile(version=EVENT_PREFIX + text.partition("|")[0]))
    elif command:
        say(f"unknown command {command!r}; there are load, profile, tags and event")


async def obey_stdin(gossip_socket: GossipSocket) -> None:
    """Until the end of stdin."""
    buffer = b""
    async with trio.lowlevel.FdStream(os.dup(sys.stdin.fileno())) as stdin:
        async for data in stdin:
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                obey(line.decode(), gossip_socket)
            if len(buffer) > LINE_BYTES_MAX:
                raise SystemExit(f"a command of more than {LINE_BYTES_MAX} bytes")


def address_of(text: str) -> Address:
    host, _, port = text.rpartition(":")
    return Address(host, int(port))


async def run(name: str, address: Address, seeds: tuple[Address, ...], key: str, watch: LoadWatch | None) -> None:
    """Take part in the mesh until stdin ends, then leave it."""
    keyring = Keyring([parse_key(key)])
    boot_id = secrets.token_bytes(BOOT_ID_BYTES)
    forwarder = Forwarder(
        node_id=name,
        boot_id=boot_id,
        keyring=keyring,
        serve=lambda stream: state_exchange.answer(stream, gossip),
        on_peer_lost=lambda node_id: gossip_socket.link_failed(node_id),
    )
    # The wall clock stands in for the counter of a data directory: it is greater at each start as well.
    generation = int(time.time())
    gossip = WatchedGossip(
        GossipConfig(), name, generation, address, seeds, keyring, boot_id, random.Random(), trio.current_time()
    )
    gossip.watch = watch
    bound = bind(address.host, address.port)
    listening = socket.create_server((address.host, address.port))
    gossip_socket = GossipSocket(
        gossip,
        bound,
        ping_link=forwarder.ping,
        ask_link=partial(state_exchange.ask, forwarder),
        on_change=say_change,
    )
    gossip_socket.set_load(NodeLoad(Readiness.READY))
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(forwarder.run, [trio.SocketListener(trio.socket.from_stdlib_socket(listening))])
            await nursery.start(gossip_socket.run)
            say(RUNNING)
            await obey_stdin(gossip_socket)
            gossip_socket.leave()
            nursery.cancel_scope.cancel()
    finally:
        bound.close()


def main() -> None:
    name, own, seed, key = sys.argv[1:5]
    watch = None if sys.argv[5:] == ["unwatched"] else LoadWatch()
    trio.run(run, name, address_of(own), () if seed == "-" else (address_of(seed),), key, watch)


if __name__ == "__main__":
    main()
