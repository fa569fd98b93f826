"""Signs of life between whole cores: who sends them, who passes them on, and how a load that was missed still comes."""

from __future__ import annotations

import random
from collections import Counter

import msgpack
import pytest

from mesh import packets, wire
from mesh.exchange import decode_answer, encode_question
from mesh.gossip import Gossip, GossipConfig
from mesh.gossip_types import SendDatagram
from mesh.member import Member, own_member
from mesh.membership import MemberTable
from mesh.outbox import Outbox
from mesh.seal import DEVELOPMENT_KEY, DatagramSealer, Keyring
from mesh.signs import Sign, encode_sign, long_hash, with_signs
from mesh.state import encode_load
from mesh.view import Address, MemberStatus, NodeLoad, NodeProfile, Readiness
from tests.unit.test_gossip import KEYS, Wire, address, gossip, packets_of, record

ALIVE, SUSPECT, DEAD, LEFT = MemberStatus


def hot(load: int) -> bytes:
    return encode_load(NodeLoad(Readiness.READY, active_requests=load))


def sign(name: str, version: int, since: int) -> Sign:
    return Sign(long_hash(name), 1, version, version - since)


def told(core: Gossip, *news: packets.Record | Sign, sender: str = "b", now: float = 0.1) -> None:
    """The core hears it from b."""
    records = tuple(item for item in news if isinstance(item, packets.Record))
    signs = tuple(item for item in news if isinstance(item, Sign))
    packet = packets.Packet(sender, packets.Rumour(), records, signs)
    core.receive(told_by_b.seal(wire.encode(packet)), address(sender), now)


told_by_b = DatagramSealer(KEYS, b"b" * 16)


def sent_by(core: Gossip, now: float) -> list[packets.Packet]:
    return [packet for _, packet in packets_of(core.tick(now))]


def signs_of(packets: list[packets.Packet], name: str) -> set[Sign]:
    return {found for packet in packets for found in packet.signs if found.long_hash == long_hash(name)}


def row(core: Gossip, name: str) -> Member:
    return core._table.members[name]


def test_in_a_mesh_too_large_to_tell_everybody_members_pass_on_signs_of_each_other() -> None:
    config = GossipConfig(everyone_max=3)
    names = "abcdefgh"
    seeds = (address("a"),)
    mesh = Wire(*(Gossip(config, n, 1, address(n), seeds, KEYS, n.encode() * 16, random.Random(n), 0.0) for n in names))
    mesh.run(15.0)
    nodes = {node.node_id: node for node in mesh.nodes.values()}
    before = {name: node._own.version for name, node in nodes.items()}
    mesh.effects.clear()
    mesh.run(3.0)
    opener = DatagramSealer(KEYS, b"reader".ljust(16))
    relayed = Counter[str]()
    for name, effect in mesh.effects:
        if isinstance(effect, SendDatagram):
            packet = wire.decode(opener.open(effect.data).payload)
            relayed["signs"] += sum(found.long_hash != long_hash(name) for found in packet.signs)
            if isinstance(packet.message, packets.Rumour):
                relayed["records"] += sum(found.node_id != name for found in packet.records)
    assert relayed["signs"] > 100
    assert relayed["records"] == 0
    for observer in nodes.values():
        for name in set(names) - {observer.node_id}:
            assert row(observer, name).load_version >= before[name]


def test_the_own_sign_goes_along_once_a_load_is_published_again_and_nothing_else_is_new() -> None:
    core = gossip("a")
    told(core, record("b", 1), now=0.0)
    own = core._own
    assert signs_of(sent_by(core, 0.1), "a") == set()
    since = own.version
    assert signs_of(sent_by(core, 1.2), "a") == {sign("a", own.version, since)}
    core.set_profile(NodeProfile(version="2"), 1.3)
    assert signs_of(sent_by(core, 1.4), "a") == set()
    since = own.version
    assert signs_of(sent_by(core, 2.5), "a") == {sign("a", own.version, since)}
    core.set_bulk(b"bulk", 2.6)
    assert signs_of(sent_by(core, 3.6), "a") == set()
    assert signs_of(sent_by(core, 4.7), "a") == {sign("a", own.version, own.bulk_version)}
    farewell = [packet for _, packet in packets_of(core.leave(4.8))]
    assert farewell
    assert signs_of(farewell, "a") == set()


def test_a_load_that_was_missed_is_asked_for_until_it_is_there() -> None:
    core = gossip("a")
    told(core, record("b", 3, hot=hot(1)), record("c", 3, hot=hot(2)))
    core.tick(0.2)
    told(core, sign("c", 9, 5), now=0.3)
    assert row(core, "c").lacks_load
    asked = []
    for step in range(1, 9):
        effects = core.tick(0.3 + step * core._config.digest_hurry_s)
        asked += [to for to, packet in packets_of(effects) if isinstance(packet.message, packets.Digest)]
    assert asked.count(address("c")) >= 4
    assert len(asked) >= 6  # of others too, who may have it and be heard
    told(core, record("c", 9, hot=hot(7)), now=3.0)
    assert not row(core, "c").lacks_load
    core.tick(3.3)
    later = [core.tick(3.3 + step * core._config.digest_hurry_s) for step in range(1, 6)]
    digests = [
        packet for effects in later for _, packet in packets_of(effects) if isinstance(packet.message, packets.Digest)
    ]
    assert len(digests) <= 1


def test_what_stands_beside_a_malformed_sign_is_not_taken() -> None:
    core = gossip("a")
    good = wire.encode_record(record("b", 3, hot=hot(1)))
    head = msgpack.packb([5, "b", [1, 1, 9, 10]])
    core.receive(told_by_b.seal(head + good), address("b"), 0.1)
    assert list(core._table.members) == ["a"]
    assert core.statistics().rejects["malformed"] == 1


def test_who_lacks_a_load_still_tells_what_it_knows() -> None:
    """It asks with version 0, and answers with what it holds."""
    holder, asker = gossip("a"), gossip("b")
    told(holder, record("c", 3, hot=hot(2)), now=0.1)
    told(holder, sign("c", 9, 5), now=0.2)
    assert row(holder, "c").lacks_load
    asker.take_exchange("a", holder.answer_exchange(_question(asker), 0.3), 0.3)
    assert row(asker, "c").version == 9
    told(holder, record("c", 9, status=DEAD), now=0.4)
    asker.take_exchange("a", holder.answer_exchange(_question(asker), 0.5), 0.5)
    assert row(asker, "c").status is DEAD
    assert _answered(holder, asker) == []  # and of the dead it asks and tells no more


def _question(core: Gossip) -> bytes:
    return encode_question(core._table)


def _answered(holder: Gossip, asker: Gossip) -> list[str]:
    """Whom the holder tells the asker of."""
    told = decode_answer(holder.answer_exchange(_question(asker), 1.0))
    return [item.record.node_id for item in told if item.record.node_id == "c"]


@pytest.mark.parametrize("name_bytes", [1, wire.NODE_ID_BYTES_MAX])
def test_no_datagram_is_too_long_whatever_it_has_to_hold(name_bytes: int) -> None:
    name = "o" * name_bytes
    table = MemberTable(own_member(name, 1, Address("10.0.0.1", 7946), b"", 0.0))
    suspect = "s" * name_bytes
    plan = table.plan(packets.Record(suspect, 1, 5, SUSPECT, Address("10.0.0.2", 7946), hot=hot(1)))
    assert plan is not None
    member = table.apply(plan, 0.0, told_by="")
    assert member is not None
    config = GossipConfig(packet_rate=1e6, packet_burst=10**6, byte_rate=1e9)
    outbox = Outbox(config, table, DatagramSealer(Keyring([DEVELOPMENT_KEY]), b"o" * 16), 0.0)
    own = table.own
    sizes = []
    for own_bytes in range(700, wire.SECTION_BYTES_MAX + 1, 4):
        for other_bytes in range(0, wire.SECTION_BYTES_MAX + 1, 64):
            own.version, own.load_version, own.hot_since, own.hot = 9, 9, 3, bytes(own_bytes)
            member.hot, member.load_version = bytes(other_bytes), member.version
            own.touched()
            member.touched()
            outbox.send(member.address, packets.Ack(1, suspect), 0.0, records=[member.encoded(with_warm=False)])
            outbox.send(member.address, packets.Ping(1, suspect), 0.0, to=member)
            sizes += [len(effect.data) for effect in outbox.drain() if isinstance(effect, SendDatagram)]
    assert max(sizes) <= wire.DATAGRAM_BYTES_MAX


def test_a_head_with_signs_is_the_head_of_the_array_that_it_says() -> None:
    head = wire.encode_head("a", packets.Digest(0, 1, (), False))
    signs = [Sign(random.Random(seed).getrandbits(64), 1, seed + 1, seed) for seed in range(60)]
    whole = with_signs(head, [encode_sign(one) for one in signs])
    assert msgpack.unpackb(whole) == [*msgpack.unpackb(head), [number for one in signs for number in one]]
