"""What is sent comes out as it went in; what was not sent by this protocol is refused whole."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import packets, wire
from mesh.errors import MalformedDatagram
from mesh.packets import Packet, Record
from mesh.signs import LONG_HASH_MAX, Sign
from mesh.view import Address, MemberStatus
from mesh.wire import PAYLOAD_BYTES_MAX, decode, encode

counts = st.integers(0, wire.COUNT_MAX)
hashes = st.integers(0, wire.HASH_MAX)
ids = st.text(min_size=1, max_size=16)
statuses = st.sampled_from(MemberStatus)
addresses = st.builds(
    Address, st.one_of(st.ip_addresses(v=4).map(str), st.ip_addresses(v=6).map(str)), st.integers(0, 65_535)
)
sections = st.none() | st.binary(max_size=60)
accusers = st.sets(hashes, max_size=wire.ACCUSERS_MAX).map(lambda found: tuple(sorted(found)))
lives, versions = st.integers(0, wire.GENERATION_MAX), st.integers(0, wire.VERSION_MAX)
plain_records = st.builds(Record, ids, lives, versions, statuses, addresses, versions, sections, sections) | st.builds(
    Record, ids, lives, versions, st.just(MemberStatus.SUSPECT), addresses, versions, sections, sections, accusers
)
positive = st.integers(1, wire.VERSION_MAX)
records = plain_records | st.builds(
    lambda record, version, bulk, boot: replace(record, bulk_version=version, bulk=bulk, boot_id=boot),
    plain_records,
    positive,
    sections,
    st.just(b"") | st.binary(min_size=16, max_size=16),
)
entries = st.builds(packets.DigestEntry, hashes, counts, counts, statuses, counts, counts)
messages = st.one_of(
    st.builds(packets.Ping, counts, ids),
    st.builds(packets.Ack, counts, ids, counts),
    st.builds(packets.PingRequest, counts, ids, addresses),
    st.builds(packets.Nack, counts),
    st.just(packets.Rumour()),
    st.builds(packets.Digest, hashes, hashes, st.lists(entries, max_size=8).map(tuple), st.booleans()),
    st.builds(packets.Delta, counts),
    st.builds(packets.Join, counts, counts, counts),
    st.just(packets.Leave()),
    st.builds(packets.Cookie, counts),
    st.builds(packets.CookieEcho, counts, counts),
    st.builds(packets.Conflict, counts, addresses, counts),
)
signs = st.builds(
    lambda id_hash, generation, version, since: Sign(id_hash, generation, version, version - min(version, since)),
    st.integers(0, LONG_HASH_MAX),
    lives,
    versions,
    versions,
)
any_packets = st.builds(
    Packet, ids, messages, st.lists(records, max_size=3).map(tuple), st.lists(signs, max_size=3).map(tuple)
)

RECORD = Record("b", 3, 70, MemberStatus.ALIVE, Address("10.0.0.2", 7946), 1, b"hot", b"warm")
PACKET = Packet("a", packets.Ping(5, "b"), (RECORD,))


@given(any_packets)
def test_a_packet_is_decoded_as_it_was_encoded(packet: Packet) -> None:
    assert decode(encode(packet)) == packet


@given(st.binary(max_size=PAYLOAD_BYTES_MAX + 10))
def test_arbitrary_bytes_are_a_packet_or_refused(payload: bytes) -> None:
    with contextlib.suppress(MalformedDatagram):
        decode(payload)


@given(any_packets, st.data())
def test_a_mutated_packet_is_a_packet_or_refused(packet: Packet, data: st.DataObject) -> None:
    payload = bytearray(encode(packet))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(MalformedDatagram):
        decode(bytes(payload))


@given(any_packets, st.data())
def test_a_packet_cut_short_is_refused_or_ends_at_a_record(packet: Packet, data: st.DataObject) -> None:
    payload = encode(packet)
    cut = data.draw(st.integers(0, len(payload) - 1))
    try:
        decoded = decode(payload[:cut])
    except MalformedDatagram:
        return
    assert decoded.records == packet.records[: len(decoded.records)]


def test_fields_of_a_newer_version_are_ignored() -> None:
    head = msgpack.packb([1, "a", 5, "b", [], "something new", {"of": "later"}])
    newer = msgpack.packb([*msgpack.unpackb(wire.encode_record(RECORD)), [], 0, None, None, "something new"])
    assert decode(head + newer) == PACKET


def test_a_message_of_a_newer_version_is_ignored_but_not_the_records_beside_it() -> None:
    assert decode(msgpack.packb([99, "a", "something new"]) + wire.encode_record(RECORD)) == Packet(
        "a", packets.Unknown(), (RECORD,)
    )


def test_only_a_cookie_and_its_echo_come_without_a_name() -> None:
    assert decode(encode(Packet("", packets.Cookie(5)))) == Packet("", packets.Cookie(5))
    with pytest.raises(MalformedDatagram):
        decode(encode(Packet("", packets.Nack(5))))


def head(*fields: object) -> bytes:
    packed: bytes = msgpack.packb(fields)
    return packed


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"", id="empty"),
        pytest.param(head(1, "a", 5), id="a field is missing"),
        pytest.param(head(1, "", 5, "b"), id="sender without a name"),
        pytest.param(head(1, "x" * 65, 5, "b"), id="sender with a long name"),
        pytest.param(head(1, "a", -1, "b"), id="negative count"),
        pytest.param(head(1, "a", 2**63, "b"), id="count beyond its limit"),
        pytest.param(head(1, "a", True, "b"), id="a truth value for a count"),
        pytest.param(head(1, "a", 1.0, "b"), id="a float for a count"),
        pytest.param(head(1, b"a", 1, "b"), id="bytes for a name"),
        pytest.param(head(3, "a", 1, "b", b"12345"), id="address of five bytes"),
        pytest.param(head(3, "a", 1, "b", "1.2.3.4:5"), id="address as text"),
        pytest.param(head(6, "a", 0, 1, [[1, 1, 1, 9, 1]], False), id="unknown status in a digest"),
        pytest.param(head(6, "a", 0, 1, [[1, 1, 1, 0, 0]] * 81, False), id="digest of 81 entries"),
        pytest.param(head(6, "a", 0, 1, [], 1), id="digest without its flag"),
        pytest.param(head(5, "a") + head("b", 1, 1, 0, b"123456", 0, "hot", None), id="section as text"),
        pytest.param(head(5, "a") + head("b", 1, 1, 0, b"123456", 0, b"h" * 897, None), id="section too large"),
        pytest.param(head(5, "a") + head("b", 1, 1, 0, b"123456", 0, None, None, [1]), id="the living accused"),
        pytest.param(head(5, "a") + head("b", 1, 1, 1, b"123456", 0, None, None, [1, 2, 3, 4]), id="four accusers"),
        pytest.param(head(5, "a", "signs"), id="a text for signs of life"),
        pytest.param(head(5, "a", [1, 1, 9]), id="a sign of life of three numbers"),
        pytest.param(head(5, "a", [1, 1, 9, True]), id="a truth value in a sign of life"),
        pytest.param(head(5, "a", [1, 1, 9, -1]), id="a sign of life from the future"),
        pytest.param(head(5, "a", [1, 1, 9, 10]), id="a load unchanged for longer than there were versions"),
        pytest.param(head(5, "a", [1, 1, wire.VERSION_MAX + 1, 0]), id="a version beyond its limit"),
        pytest.param(head(5, "a") + b"\xc1", id="a byte msgpack never uses"),
        pytest.param(head(5, "a") + b"\x93\x01", id="a record cut short"),
        pytest.param(head(5, "a") + b"\x80", id="a map for a record"),
        pytest.param(b"\x91" * 1_100, id="nested deep"),
        pytest.param(head(5, "a" * 10) + b"\x00" * PAYLOAD_BYTES_MAX, id="larger than a datagram"),
    ],
)
def test_what_is_no_packet_is_refused(payload: bytes) -> None:
    with pytest.raises(MalformedDatagram):
        decode(payload)


@pytest.mark.parametrize("with_hot", [True, False], ids=["hot", "warm"])
def test_the_largest_section_of_the_longest_name_fits_a_datagram(with_hot: bool) -> None:
    name = "x" * wire.NODE_ID_BYTES_MAX
    section = bytes(wire.SECTION_BYTES_MAX)
    record = Record(
        name,
        wire.COUNT_MAX,
        wire.COUNT_MAX,
        MemberStatus.SUSPECT,
        Address("ffff::1", 65_535),
        wire.COUNT_MAX,
        section if with_hot else None,
        None if with_hot else section,
        (wire.HASH_MAX - 2, wire.HASH_MAX - 1, wire.HASH_MAX),
    )
    assert len(encode(Packet(name, packets.Delta(wire.COUNT_MAX), (record,)))) <= PAYLOAD_BYTES_MAX


def test_a_host_name_is_no_address_for_peers() -> None:
    with pytest.raises(ValueError, match=r"seed\.example"):
        wire.pack_address(Address("seed.example", 7946))


def test_a_digest_entry_takes_the_room_it_says() -> None:
    entry = packets.DigestEntry(wire.HASH_MAX, 3, 70_000, MemberStatus.ALIVE, 2)
    empty = len(encode(Packet("a", packets.Digest(0, 1, ()))))
    assert len(encode(Packet("a", packets.Digest(0, 1, (entry,))))) == empty + wire.digest_entry_bytes(entry)
