"""Gossip.receive under fuzzing: sealed payloads, raw bytes, tampered, replayed, reflected and foreign datagrams.

A rejected one must change nothing but one count of one reason; an accepted one, however odd, must leave a node that
still ticks, views and speaks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections import Counter
from collections.abc import Sequence

from mesh import packets, wire
from mesh.gossip import Effect, Gossip, GossipConfig, GossipStatistics, SendDatagram
from mesh.membership import MEMBERS_MAX
from mesh.seal import BOOT_ID_BYTES, DEVELOPMENT_KEY, DatagramSealer, Keyring, Opened
from mesh.view import MemberStatus
from tests.fuzz.messages import LOAD, PROFILE, SENDERS, address, payloads

OWN_BOOT = b"a" * BOOT_ID_BYTES
PEER_BOOTS = tuple(letter.encode() * BOOT_ID_BYTES for letter in "bcd")
INPUTS_A_NODE = 2_000  # then a fresh one takes over, so that an early accident does not shape all that follows
MEMBERS_A_NODE = 48  # comparing whole nodes before and after costs time with each member
STEP_S = 0.02
REASONS = frozenset(
    {
        "malformed", "oversized", "protocol version", "reflected", "replayed", "seal version", "tampered", "truncated",
        "unknown key",
    }
)  # fmt: skip
# How the rest of an input is taken, by its first byte; two thirds are sealed as a peer would.
SEALED, RAW, TAMPERED, REPLAYED, REFLECTED, OTHER_CLUSTER, OTHER_KEY = range(7)
MODES = (SEALED,) * 12 + (RAW, TAMPERED, REPLAYED, REFLECTED, OTHER_CLUSTER, OTHER_KEY)
SOURCES = tuple(address(name) for name in ("b", "c", "z"))

KEYS = Keyring([DEVELOPMENT_KEY])


def new_node() -> Gossip:
    node = Gossip(GossipConfig(), "a", 1, address("a"), (address("b"),), KEYS, OWN_BOOT, random.Random(1), 0.0)
    node.set_load(LOAD, 0.0)
    node.set_profile(PROFILE, 0.0)
    node.tick(0.0)
    for boot_id in PEER_BOOTS:
        node._sealer.admit(Opened(boot_id, 0, b"", is_admitted=False))  # else nothing of theirs would be taken
        for source in SOURCES:
            node._reception._admission.note(boot_id, source)
    return node


def fingerprint(node: Gossip, now: float) -> list[object]:
    """All that a datagram could change and a caller could see, or another node be told; rejects left out."""
    table = node._table
    return [
        [[getattr(m, name, None) for name in MEMBER_FIELDS] for m in table.members.values()],
        [m.node_id for m in table.live],
        list(table.tombstones.items()),
        dataclasses.replace(node.statistics(), rejects={}),
        node.view(now),
        node.next_wakeup(),
    ]


MEMBER_FIELDS = (
    "node_id", "address", "generation", "version", "status", "accusers", "warm_version", "profile_version",
    "load_version", "load", "profile", "hot", "warm", "bulk", "bulk_version", "bulk_version_heard", "advanced_at",
    "load_at", "known_since", "suspected_at", "told_by", "boot_id",
)  # fmt: skip


def total(counts: GossipStatistics) -> tuple[int, int]:
    """(accepted, rejected) so far."""
    return sum(counts.packets_received.values()), sum(counts.rejects.values())


class DatagramSubject:
    """Feeds a node that is compared with itself before and after, and the same inputs to one that is never renewed."""

    name = "datagram"

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.flooded = new_node()
        self._now = 0.0
        self._peers = [DatagramSealer(KEYS, boot_id) for boot_id in PEER_BOOTS]
        self._mirror = DatagramSealer(KEYS, OWN_BOOT)
        self._foreign = DatagramSealer(Keyring([DEVELOPMENT_KEY], "another mesh"), b"f" * BOOT_ID_BYTES)
        self._keyless = DatagramSealer(Keyring([b"k" * 32]), b"k" * BOOT_ID_BYTES)
        self._last: bytes | None = None  # the datagram accepted last by the present node
        self._renew()

    def seeds(self) -> list[bytes]:
        return [bytes([mode]) + payload for mode in range(len(MODES)) for payload in payloads()]

    def feed(self, data: bytes) -> None:
        if self._fed >= INPUTS_A_NODE or len(self._node.view(self._now).members) > MEMBERS_A_NODE:
            self._renew()
        self._fed += 1
        self._now += STEP_S
        mode = MODES[data[0] % len(MODES)] if data else RAW
        datagram = self._datagram(mode, data[1:])
        source = SOURCES[len(data) % len(SOURCES)]
        before, counts = fingerprint(self._node, self._now), self._node.statistics()
        effects = self._node.receive(datagram, source, self._now)
        after = self._node.statistics()
        accepted, rejected = (new - old for new, old in zip(total(after), total(counts), strict=True))
        if rejected:
            reason = next(r for r, count in after.rejects.items() if count != counts.rejects.get(r, 0))
            assert (accepted, rejected) == (0, 1), f"one datagram counted {accepted} + {rejected} times"
            assert reason in REASONS, f"an unknown reason {reason!r}"
            assert not effects, f"a rejected datagram had effects: {effects}"
            assert fingerprint(self._node, self._now) == before, f"a datagram rejected as {reason} changed the node"
            self.outcomes[reason] += 1
        else:
            assert accepted == 1, f"one datagram counted {accepted} times"
            assert mode == SEALED or (mode == REPLAYED and self._last is None), f"mode {mode} was accepted"
            self._last = datagram
            self.outcomes["accepted"] += 1
        self._check(effects)
        self._check(self._node.tick(self._now))
        self.flooded.receive(datagram, source, self._now)
        self.flooded.receive(self._newcomer(data), source, self._now)
        self._check(self.flooded.tick(self._now))
        assert self.flooded.statistics().members <= MEMBERS_MAX

    def _renew(self) -> None:
        self._node = new_node()
        # Its clock starts where this one is: the time before is one tick, which it takes for a stall.
        self._node.tick(self._now)
        self._fed = 0
        self._last = None

    def _datagram(self, mode: int, payload: bytes) -> bytes:
        cut = payload[: wire.PAYLOAD_BYTES_MAX + 1]  # one byte too many is the most a sender could seal
        peer = self._peers[len(payload) % len(self._peers)]
        if mode == RAW:
            return payload
        if mode == TAMPERED:
            sealed = bytearray(peer.seal(cut))
            for i, byte in enumerate(payload[:8]):
                sealed[(byte * 7 + i) % len(sealed)] ^= byte | 1
            return bytes(sealed[: len(sealed) - len(payload) % 3]) + b"\x00"
        if mode == REPLAYED:
            return self._last if self._last is not None else peer.seal(cut)
        sealer = {REFLECTED: self._mirror, OTHER_CLUSTER: self._foreign, OTHER_KEY: self._keyless}.get(mode, peer)
        return sealer.seal(cut)

    def _newcomer(self, data: bytes) -> bytes:
        """Valid news of some member, mostly one never heard of: fills what is bounded by nothing but a limit."""
        digest = hashlib.blake2b(data, digest_size=8).hexdigest()
        status = MemberStatus(int(digest[0], 16) % len(MemberStatus))
        accusers = (int(digest[:8], 16),) if status is MemberStatus.SUSPECT else ()
        record = packets.Record(digest[:6], 1, int(self._now / STEP_S), status, SOURCES[0], accusers=accusers)
        peer = self._peers[int(digest[9], 16) % len(self._peers)]  # each below what counts as a flood
        return peer.seal(wire.encode(packets.Packet("b", packets.Rumour(), (record,))))

    def _check(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, SendDatagram):
                assert len(effect.data) <= wire.DATAGRAM_BYTES_MAX, f"it sends {len(effect.data)} bytes"


assert "a" not in SENDERS  # who speaks as the node itself is told nothing
