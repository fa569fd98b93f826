"""CPU time and memory of one real core that knows thousands of members, all of which are made up here:
`python -m tests.simulation.one_of_many --members 10000`.

The peers send what a node of such a mesh is sent: 16 sealed datagrams a second full of records of members that
published since, from a different sender each, and answers to its probes. Sockets and wakeups are not in the figures."""

from __future__ import annotations

import argparse
import random
import resource
import time

from mesh import packets, wire
from mesh.gossip import Gossip, GossipConfig, SendDatagram
from mesh.membership import MEMBERS_MAX
from mesh.pace import Pace
from mesh.seal import DEVELOPMENT_KEY, DatagramSealer, Keyring
from mesh.state import encode_load, encode_profile
from mesh.view import Address, MemberStatus
from tests.simulation import inside
from tests.simulation.loads import profile_of, ready_load

PACKETS_PER_S = 16
RECORDS_PER_PACKET = 17  # of about 65 bytes
TICK_S = 0.02  # between two looks at what is due


class MadeUpPeers:
    """Members that publish when asked to, and answer pings."""

    def __init__(self, count: int, rng: random.Random) -> None:
        self._rng = rng
        self._keyring = Keyring([DEVELOPMENT_KEY])
        self.names = [f"node-{i:05}" for i in range(count)]
        self.addresses = {
            n: Address(f"10.{i // 62_500}.{i // 250 % 250}.{i % 250 + 1}", 7946) for i, n in enumerate(self.names)
        }
        self.name_at = {address: name for name, address in self.addresses.items()}
        self._versions = dict.fromkeys(self.names, 1)
        self._sealers = {name: DatagramSealer(self._keyring, rng.randbytes(16)) for name in self.names}

    def record(self, name: str, *, with_warm: bool = False) -> packets.Record:
        version = self._versions[name]
        load = ready_load(name, version, queued=self._rng.randrange(3))
        warm = encode_profile(profile_of(name)) if with_warm else None
        return packets.Record(name, 1, version, MemberStatus.ALIVE, self.addresses[name], 1, encode_load(load), warm)

    def publish(self, name: str) -> packets.Record:
        self._versions[name] += 1
        return self.record(name)

    def datagram(self, sender: str, message: packets.Message, records: int) -> bytes:
        told = [sender, *self._rng.sample(self.names, records)]
        payload = wire.encode(packets.Packet(sender, message, tuple(self.publish(n) for n in dict.fromkeys(told))))
        return self._sealers[sender].seal(payload)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.one_of_many", description=__doc__)
    parser.add_argument("--members", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the mesh's time")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.members >= MEMBERS_MAX:
        raise SystemExit(f"a table holds {MEMBERS_MAX} members, {options.members} and this node do not fit")
    rng = random.Random(options.seed)
    peers = MadeUpPeers(options.members, rng)
    records = [peers.record(name, with_warm=True) for name in peers.names]
    here = Address("10.255.0.1", 7946)
    keyring = Keyring([DEVELOPMENT_KEY])
    before_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    core = Gossip(GossipConfig(), "this", 1, here, (), keyring, rng.randbytes(16), random.Random(1), 0.0)
    table = inside.table(core)
    began = time.process_time()
    for record in records:
        plan = table.plan(record)
        if plan is not None:
            table.apply(plan, 0.0, told_by="")
    learnt_s = time.process_time() - began
    print(f"to learn {options.members} members took {learnt_s:.2f} s of CPU")
    _drive(core, peers, rng, options.seconds)
    grown_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before_mib
    print(f"memory grew by {grown_mib:.0f} MiB, {grown_mib * 1024 / options.members:.1f} KiB a member")
    print(f"publishes each {Pace(core._config, table).publish_interval_s:.1f} s")


def _drive(core: Gossip, peers: MadeUpPeers, rng: random.Random, seconds: float) -> None:
    spent = {"receive": 0.0, "tick": 0.0, "view": 0.0}
    now, sent_bytes, sent, views = 0.0, 0, 0, 0
    due = [i / PACKETS_PER_S for i in range(int(seconds * PACKETS_PER_S))]
    while now < seconds:
        now += TICK_S
        arriving = []
        while due and due[0] <= now:
            due.pop(0)
            sender = rng.choice(peers.names)
            arriving.append((peers.datagram(sender, packets.Rumour(), RECORDS_PER_PACKET), peers.addresses[sender]))
        while arriving or core.next_wakeup() <= now:
            began = time.process_time()
            effects = [e for data, source in arriving for e in core.receive(data, source, now)]
            received = time.process_time()
            effects += core.tick(now)
            spent["receive"] += received - began
            spent["tick"] += time.process_time() - received
            arriving = []
            for effect in effects:
                if isinstance(effect, SendDatagram):
                    sent += 1
                    sent_bytes += len(effect.data)
                    arriving += _answers(core, peers, effect)
        if round(now / TICK_S) % round(1 / TICK_S) == 0:
            began = time.process_time()
            core.view(now)
            spent["view"] += time.process_time() - began
            views += 1
    statistics = core.statistics()
    print(f"in {seconds:.0f} s sent {sent / seconds:.1f} packets/s, {sent_bytes / seconds:.0f} B/s")
    print(f"received {statistics.bytes_received / seconds:.0f} B/s, rejected {dict(statistics.rejects)}")
    print(f"suspicions {statistics.suspicions}, deaths {statistics.deaths}")
    for what in ("receive", "tick"):
        print(f"{what}: {spent[what] / seconds:.2%} of a core")
    print(f"one view of all members: {spent['view'] / views * 1e3:.1f} ms")


def _answers(core: Gossip, peers: MadeUpPeers, sent: SendDatagram) -> list[tuple[bytes, Address]]:
    """What a peer that is well says to a ping."""
    name = peers.name_at.get(sent.address)
    if name is None:
        return []
    opened = DatagramSealer(Keyring([DEVELOPMENT_KEY]), b"nobody's boot id").open(sent.data).payload
    message = wire.decode(opened).message
    if not isinstance(message, packets.Ping) or message.target != name:
        return []
    return [(peers.datagram(name, packets.Ack(message.sequence, name), RECORDS_PER_PACKET), sent.address)]


if __name__ == "__main__":
    main()
