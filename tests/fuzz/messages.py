"""Valid payloads of every message of the protocols, as starting points of mutation."""

from __future__ import annotations

import msgpack

from mesh import packets, wire
from mesh.signs import Sign, long_hash
from mesh.state import encode_load, encode_profile
from mesh.view import EMBEDDING, Address, MemberStatus, ModelInfo, ModelLoad, NodeLoad, NodeProfile, Readiness

LOAD = NodeLoad(Readiness.READY, 3, 41.5, 0.002, {"demo": ModelLoad(2, 9, 6, 900.0, 41.5, 1234, 700)})
PROFILE = NodeProfile(
    "10.0.0.2:8080", "0.1.0", (ModelInfo("demo", "ab12" * 8, 2048, 8), ModelInfo("e", "", 512, 64, kind=EMBEDDING))
)
SENDERS = ("b", "c", "d", "stranger")


def address(name: str) -> Address:
    return Address(f"10.0.0.{ord(name[0]) - 96}", 7946)


def sections() -> list[bytes]:
    empty = [encode_load(NodeLoad()), encode_profile(NodeProfile())]
    return [encode_load(LOAD), encode_profile(PROFILE), *empty]


def records() -> list[packets.Record]:
    hot, warm, *_ = sections()
    return [
        packets.Record("b", 1, 9, MemberStatus.ALIVE, address("b"), 1, hot),
        packets.Record("c", 1, 9, MemberStatus.ALIVE, address("c"), 9, None, warm),
        packets.Record("d", 1, 9, MemberStatus.SUSPECT, address("d"), 1, accusers=(17, 2**31)),
        packets.Record("a", 1, 1, MemberStatus.DEAD, address("a"), 1),
        packets.Record("e", 2, 5, MemberStatus.LEFT, Address("fe80::1", 7946), 0, hot, warm),
    ]


def signs_of_life() -> tuple[Sign, ...]:
    """Of a load that is held, of one that is not, of nobody."""
    return Sign(long_hash("b"), 1, 12, 3), Sign(long_hash("c"), 1, 12, 1), Sign(2**64 - 1, 1, 9, 9)


def payloads() -> list[bytes]:
    entry = packets.DigestEntry(2**20, 1, 9, MemberStatus.ALIVE, 1)
    messages: list[packets.Message] = [
        packets.Ping(5, "a"),
        packets.Ack(5, "a"),
        packets.PingRequest(5, "c", address("c")),
        packets.Nack(5),
        packets.Rumour(),
        packets.Digest(0, wire.HASH_MAX, (entry,)),
        packets.Digest(0, wire.HASH_MAX, (), True),
        packets.Delta(3),
        packets.Join(7),
        packets.Leave(),
        packets.Join(8, packets.PROTOCOL_MAX + 1, packets.PROTOCOL_MAX + 1),
    ]
    told, signs = records(), signs_of_life()
    return [
        wire.encode(packets.Packet(SENDERS[i % len(SENDERS)], message, tuple(told[i % 4 : i % 4 + 2]), signs[: i % 4]))
        for i, message in enumerate(messages)
    ]


def frames() -> list[bytes]:
    """Bodies of sealed frames of a peer link, of both directions."""
    load = encode_load(LOAD)
    bodies: list[list[object]] = [
        [1, 9, b"request"],
        [2, [[1, ["text", [1, 2], None]], [2, {"done": True}]], load],
        [2, [[1, "x"]]],
        [3, 1, None, "", 0.0],
        [3, 2, "no_capacity", "full", 1.5],
        [4, 1],
        [5, 3],
        [6, 3, load],
        [7],
        [99, "of a later version"],
    ]
    return [msgpack.packb(body) for body in bodies]
