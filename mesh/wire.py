"""The bytes of datagrams, and their limits. Everything a peer sends is checked here.

A payload is one msgpack array [type, sender, ...fields, signs], then any number of records to the end, one array each.
Arrays may be longer than this version knows: what follows is ignored; so is the message of a type that it does not
know, but not the records beside it. The sections inside a record are opaque here and forwarded as the bytes they came
in; mesh.state reads hot and warm.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from ipaddress import ip_address
from operator import lt
from typing import Any, assert_never

import msgpack

from mesh.errors import MalformedDatagram
from mesh.packets import (
    Ack,
    Conflict,
    Cookie,
    CookieEcho,
    Delta,
    Digest,
    DigestEntry,
    Join,
    Leave,
    Message,
    Nack,
    Packet,
    Ping,
    PingRequest,
    Record,
    Rumour,
    Unknown,
)
from mesh.seal import BOOT_ID_BYTES, OVERHEAD_BYTES
from mesh.signs import LONG_HASH_MAX, Sign, encode_sign, with_signs
from mesh.view import Address, MemberStatus

DATAGRAM_BYTES_MAX = 1_200  # below 1280, the smallest MTU IPv6 allows, less IP and UDP headers: IP never fragments
PAYLOAD_BYTES_MAX = DATAGRAM_BYTES_MAX - OVERHEAD_BYTES
NODE_ID_BYTES_MAX = 64
SECTION_BYTES_MAX = 896  # one section and its claim always fit one datagram, even under the longest node id
BULK_INLINE_BYTES_MAX = 512  # of a bulk section in a datagram: beside it there is room for the load and other news
BULK_BYTES_MAX = 256 * 1024  # a bulk section, which crosses on peer links where it fits no datagram
ACCUSERS_MAX = 3  # one who suspects and k=2 independent confirmations (Lifeguard)
COUNT_MAX = 2**63 - 1  # sequences, counts
# Of generations and versions: more than any life has, with room in their 64 bits to go past what is heard.
GENERATION_MAX = 2**48
VERSION_MAX = 2**62
HASH_MAX = 2**32 - 1  # ids as 32-bit hashes, in digests and accusations
ADDRESSES_MAX = 16_384  # remembered in both forms, about 300 bytes each: to convert one costs more than the record
DIGEST_ENTRIES_MAX = 80  # of at most 40 bytes; usual ones are 13 to 18, so a full digest fits one datagram
# Each type's number.
_PING, _ACK, _PING_REQUEST, _NACK, _RUMOUR, _DIGEST, _DELTA, _JOIN, _LEAVE = range(1, 10)
_COOKIE, _COOKIE_ECHO, _CONFLICT = range(10, 13)


def encode(packet: Packet) -> bytes:
    """The payload. The caller keeps it within PAYLOAD_BYTES_MAX; see encode_head and encode_record."""
    head = encode_head(packet.sender, packet.message)
    if packet.signs:
        head = with_signs(head, [encode_sign(sign) for sign in packet.signs])
    return b"".join([head, *map(encode_record, packet.records)])


def encode_head(sender: str, message: Message) -> bytes:
    """A payload without records; encoded records are appended to it."""
    match message:
        case Ping(sequence, target):
            fields: list[object] = [_PING, sender, sequence, target]
        case Ack(sequence, target, cookie):
            fields = [_ACK, sender, sequence, target, cookie]
        case PingRequest(sequence, target, address):
            fields = [_PING_REQUEST, sender, sequence, target, pack_address(address)]
        case Nack(sequence):
            fields = [_NACK, sender, sequence]
        case Rumour():
            fields = [_RUMOUR, sender]
        case Digest(low, high, entries, is_reply):
            fields = [_DIGEST, sender, low, high, [pack_digest_entry(entry) for entry in entries], is_reply]
        case Delta(join_sequence):
            fields = [_DELTA, sender, join_sequence]
        case Join(sequence, protocol_min, protocol_max):
            fields = [_JOIN, sender, sequence, protocol_min, protocol_max]
        case Leave():
            fields = [_LEAVE, sender]
        case Cookie(cookie):
            fields = [_COOKIE, sender, cookie, 0]  # as long as its echo without a call
        case CookieEcho(cookie, join_sequence):
            fields = [_COOKIE_ECHO, sender, cookie, join_sequence]
        case Conflict(known_ms, address, join_sequence):
            fields = [_CONFLICT, sender, known_ms, pack_address(address), join_sequence]
        case Unknown():
            raise AssertionError("a message of a later version has no bytes here")
        case _:
            assert_never(message)
    encoded: bytes = msgpack.packb(fields)
    return encoded


def digest_entry_bytes(entry: DigestEntry) -> int:
    """How much of a digest this entry takes."""
    return len(msgpack.packb(pack_digest_entry(entry)))


def pack_digest_entry(entry: DigestEntry) -> list[int]:
    """As an array for msgpack."""
    fields = [entry.id_hash, entry.generation, entry.version, int(entry.status), entry.profile_version]
    return [*fields, entry.bulk_version] if entry.bulk_version else fields


def encode_record(record: Record) -> bytes:
    fields: list[object] = [
        record.node_id,
        record.generation,
        record.version,
        int(record.status),
        pack_address(record.address),
        record.warm_version,
        record.hot,
        record.warm,
    ]
    optional = [record.accusers or None, record.bulk_version, record.bulk, record.boot_id or None]
    while optional and optional[-1] in (None, 0):  # most records end here
        optional.pop()
    fields += optional
    encoded: bytes = msgpack.packb(fields)
    return encoded


def decode(payload: bytes) -> Packet:
    """The packet in a payload. Raises MalformedDatagram; unknown trailing fields are ignored."""
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise MalformedDatagram(f"payload of {len(payload)} bytes exceeds {PAYLOAD_BYTES_MAX}")
    unpacker = msgpack.Unpacker(strict_map_key=True, max_buffer_size=PAYLOAD_BYTES_MAX)
    unpacker.feed(payload)
    try:
        head = _array(unpacker.unpack(), 2)
        records = []
        while unpacker.tell() < len(payload):
            records.append(unpack_record(unpacker.unpack()))
    except (msgpack.UnpackException, ValueError) as exc:  # ValueError: bad UTF-8, bad format, nested too deep
        raise MalformedDatagram(f"payload of {len(payload)} bytes is no msgpack: {exc!r}") from exc
    message = _message(head)
    is_nameless = isinstance(message, Cookie | CookieEcho) and head[1] == ""
    sender = "" if is_nameless else text(head[1], NODE_ID_BYTES_MAX)
    return Packet(sender, message, tuple(records), _signs(head))


def _signs(head: Sequence[Any]) -> tuple[Sign, ...]:
    numbers = _field(head, _FIELD_COUNTS.get(head[0], len(head)))
    if numbers is None:
        return ()
    if not _array(numbers, 0):
        return ()
    columns = [numbers[i :: len(Sign._fields)] for i in range(len(Sign._fields))]
    hashes, generations, versions, unchanged = columns
    # There are hundreds a second, so each check goes over all of them at once.
    if (
        len(hashes) != len(unchanged)
        or set(map(type, numbers)) != {int}
        or min(numbers) < 0
        or max(hashes) > LONG_HASH_MAX
        or max(generations) > GENERATION_MAX
        or max(versions) > VERSION_MAX
        or any(map(lt, versions, unchanged))
    ):
        raise MalformedDatagram(f"{len(numbers)} numbers are no signs of life")
    return tuple(map(Sign._make, zip(*columns, strict=True)))


def _message(head: Sequence[Any]) -> Message:
    kind = count(head[0])
    if kind not in _FIELD_COUNTS:
        return Unknown()
    _array(head, _FIELD_COUNTS[kind])
    if kind == _PING:
        return Ping(count(head[2]), text(head[3], NODE_ID_BYTES_MAX))
    if kind == _ACK:
        return Ack(count(head[2]), text(head[3], NODE_ID_BYTES_MAX), count(head[4]))
    if kind == _PING_REQUEST:
        return PingRequest(count(head[2]), text(head[3], NODE_ID_BYTES_MAX), unpack_address(head[4]))
    if kind == _NACK:
        return Nack(count(head[2]))
    if kind == _DIGEST:
        entries = _array(head[4], 0)
        if len(entries) > DIGEST_ENTRIES_MAX:
            raise MalformedDatagram(f"digest of {len(entries)} entries exceeds {DIGEST_ENTRIES_MAX}")
        if type(head[5]) is not bool:
            raise MalformedDatagram("a digest without its reply flag")
        low, high = count(head[2], HASH_MAX), count(head[3], HASH_MAX)
        return Digest(low, high, tuple(unpack_digest_entry(e) for e in entries), head[5])
    if kind == _DELTA:
        return Delta(count(head[2]))
    if kind == _JOIN:
        return Join(count(head[2]), count(head[3]), count(head[4]))
    if kind == _COOKIE:
        return Cookie(count(head[2]))
    if kind == _COOKIE_ECHO:
        return CookieEcho(count(head[2]), count(head[3]))
    if kind == _CONFLICT:
        return Conflict(count(head[2]), unpack_address(head[3]), count(head[4]))
    return Leave() if kind == _LEAVE else Rumour()


_FIELD_COUNTS = {
    _PING: 4,
    _ACK: 5,
    _PING_REQUEST: 5,
    _NACK: 3,
    _RUMOUR: 2,
    _DIGEST: 6,
    _DELTA: 3,
    _JOIN: 5,
    _LEAVE: 2,
    _COOKIE: 4,
    _COOKIE_ECHO: 4,
    _CONFLICT: 5,
}


def unpack_record(value: Any, bulk_bytes_max: int = SECTION_BYTES_MAX) -> Record:
    """Raises MalformedDatagram."""
    fields = _array(value, 8)
    status = _status(fields[3])
    accusers: tuple[int, ...] = ()
    if (accusing := _field(fields, 8)) is not None:
        hashes = _array(accusing, 0)
        if len(hashes) > ACCUSERS_MAX or (hashes and status is not MemberStatus.SUSPECT):
            raise MalformedDatagram(f"{len(hashes)} accusers of a member that is {status.name}")
        accusers = tuple(sorted({count(h, HASH_MAX) for h in hashes}))
    return Record(
        node_id=text(fields[0], NODE_ID_BYTES_MAX),
        generation=count(fields[1], GENERATION_MAX),
        version=count(fields[2], VERSION_MAX),
        status=status,
        address=unpack_address(fields[4]),
        warm_version=count(fields[5], VERSION_MAX),
        hot=_section(fields[6]),
        warm=_section(fields[7]),
        accusers=accusers,
        bulk_version=count(_field(fields, 9) or 0, VERSION_MAX),
        bulk=_section(_field(fields, 10), bulk_bytes_max),
        boot_id=_boot_id(_field(fields, 11)),
    )


def unpack_digest_entry(value: Any) -> DigestEntry:
    """Raises MalformedDatagram."""
    fields = _array(value, 5)
    return DigestEntry(
        id_hash=count(fields[0], HASH_MAX),
        generation=count(fields[1]),
        version=count(fields[2]),
        status=_status(fields[3]),
        profile_version=count(fields[4]),
        bulk_version=count(fields[5]) if len(fields) > 5 else 0,
    )


def _array(value: Any, length_min: int) -> Sequence[Any]:
    if not isinstance(value, list) or len(value) < length_min:
        raise MalformedDatagram(f"expected an array of at least {length_min}, got {type(value).__name__}")
    return value


def _section(value: Any, bytes_max: int = SECTION_BYTES_MAX) -> bytes | None:
    if value is not None and (not isinstance(value, bytes) or len(value) > bytes_max):
        raise MalformedDatagram(f"a section is at most {bytes_max} bytes, got a {type(value).__name__}")
    return value


def _field(fields: Sequence[Any], index: int) -> Any:
    """None where the array ends before it."""
    return fields[index] if len(fields) > index else None


def _boot_id(value: Any) -> bytes:
    if value is not None and (not isinstance(value, bytes) or len(value) != BOOT_ID_BYTES):
        raise MalformedDatagram(f"a boot id has {BOOT_ID_BYTES} bytes, got a {type(value).__name__}")
    return value or b""


def _status(value: Any) -> MemberStatus:
    return MemberStatus(count(value, MemberStatus.LEFT))


def count(value: Any, maximum: int = COUNT_MAX) -> int:
    """A whole number from foreign data. Raises MalformedDatagram."""
    if type(value) is not int or not 0 <= value <= maximum:
        raise MalformedDatagram(f"expected a whole number up to {maximum}, got a {type(value).__name__}")
    return value


def text(value: Any, bytes_max: int) -> str:
    """A non-empty string from foreign data. Raises MalformedDatagram."""
    if not isinstance(value, str) or not 0 < len(value.encode()) <= bytes_max:
        raise MalformedDatagram(f"expected a text of 1 to {bytes_max} bytes, got a {type(value).__name__}")
    return value


@lru_cache(ADDRESSES_MAX)
def pack_address(address: Address) -> bytes:
    """4 or 16 bytes of IP address, 2 of port. Raises ValueError for a host name: peers are told addresses only."""
    return ip_address(address.host).packed + address.port.to_bytes(2, "big")


def unpack_address(value: Any) -> Address:
    """Raises MalformedDatagram."""
    if not isinstance(value, bytes) or len(value) not in (6, 18):
        raise MalformedDatagram(f"an address is 6 or 18 bytes, got a {type(value).__name__}")
    return _address(value)


@lru_cache(ADDRESSES_MAX)
def _address(value: bytes) -> Address:
    return Address(str(ip_address(value[:-2])), int.from_bytes(value[-2:], "big"))
