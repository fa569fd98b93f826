"""The datagrams of the mesh: their types, their bytes, their limits. Everything a peer sends is checked here.

A payload is one msgpack array [type, sender, ...fields], then any number of records to the end, one array each. Arrays
may be longer than this version knows: what follows is ignored. The hot and warm sections inside a record are opaque
here and forwarded as the bytes they came in; mesh.state reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_address
from typing import Any, assert_never

import msgpack

from mesh.errors import MalformedDatagram
from mesh.seal import OVERHEAD_BYTES
from mesh.view import Address, MemberStatus

# Versions of the protocol this node speaks; JOIN carries both, and meshes that share none do not mix.
PROTOCOL_MIN = 1
PROTOCOL_MAX = 1
DATAGRAM_BYTES_MAX = 1_200  # below 1280, the smallest MTU IPv6 allows, less IP and UDP headers: IP never fragments
PAYLOAD_BYTES_MAX = DATAGRAM_BYTES_MAX - OVERHEAD_BYTES
NODE_ID_BYTES_MAX = 64
SECTION_BYTES_MAX = 896  # one section and its claim always fit one datagram, even under the longest node id
ACCUSERS_MAX = 3  # one who suspects and k=2 independent confirmations (Lifeguard)
COUNT_MAX = 2**63 - 1  # generations, versions, sequences
HASH_MAX = 2**32 - 1  # ids as 32-bit hashes, in digests and accusations
ADDRESSES_MAX = 16_384  # remembered in both forms, about 300 bytes each: to convert one costs more than the record
DIGEST_ENTRIES_MAX = 80  # of at most 31 bytes; usual ones are 13, so a full digest fits one datagram


@dataclass(frozen=True, slots=True)
class Record:
    """What the sender believes of one member: a claim, and sections of its state.

    hot: the load published at exactly this version. warm: the profile published at warm_version.
    accusers: hashes of the ids of those who suspect it at this version, sorted; empty unless SUSPECT."""

    node_id: str
    generation: int
    version: int
    status: MemberStatus
    address: Address
    warm_version: int = 0
    hot: bytes | None = None
    warm: bytes | None = None
    accusers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Ping:
    """Are you there? Answered with Ack if `target` is the receiver."""

    sequence: int
    target: str


@dataclass(frozen=True, slots=True)
class Ack:
    """`target` answered the ping of this sequence; from itself or from who was asked to ping it."""

    sequence: int
    target: str


@dataclass(frozen=True, slots=True)
class PingRequest:
    """Please ping `target` for me: Ack if it answers, else Nack, which says that at least you are well."""

    sequence: int
    target: str
    address: Address


@dataclass(frozen=True, slots=True)
class Nack:
    """The target of a PingRequest did not answer in time."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Rumour:
    """Nothing but records."""


@dataclass(frozen=True, slots=True)
class DigestEntry:
    """What the sender holds of one member: its claim, and which profile it has of it (not which it has heard of)."""

    id_hash: int
    generation: int
    version: int
    status: MemberStatus
    profile_version: int


@dataclass(frozen=True, slots=True)
class Digest:
    """All live members the sender knows with low <= id hash <= high; none but the entries where low > high.

    The receiver answers with a Delta of what it holds newer and, unless is_reply, a Digest of what it wants."""

    low: int
    high: int
    entries: tuple[DigestEntry, ...]
    is_reply: bool = False


@dataclass(frozen=True, slots=True)
class Delta:
    """Records the receiver lacks. join_sequence: the Join it answers, or 0."""

    join_sequence: int = 0


@dataclass(frozen=True, slots=True)
class Join:
    """Here I am, tell me who is there. protocol_min..protocol_max: what the sender speaks."""

    sequence: int
    protocol_min: int = PROTOCOL_MIN
    protocol_max: int = PROTOCOL_MAX

    @property
    def is_compatible(self) -> bool:
        return self.protocol_min <= PROTOCOL_MAX and self.protocol_max >= PROTOCOL_MIN


@dataclass(frozen=True, slots=True)
class Leave:
    """The sender goes; its record says LEFT."""


Message = Ping | Ack | PingRequest | Nack | Rumour | Digest | Delta | Join | Leave

# The labels under which statistics count, and each type's number on the wire.
MESSAGE_LABELS: dict[type, str] = {
    Ping: "ping",
    Ack: "ack",
    PingRequest: "ping_request",
    Nack: "nack",
    Rumour: "gossip",
    Digest: "digest",
    Delta: "delta",
    Join: "join",
    Leave: "leave",
}
_PING, _ACK, _PING_REQUEST, _NACK, _RUMOUR, _DIGEST, _DELTA, _JOIN, _LEAVE = range(1, 10)


@dataclass(frozen=True, slots=True)
class Packet:
    """One payload: who sent it, what it asks or says, and the records that ride along."""

    sender: str
    message: Message
    records: tuple[Record, ...] = ()


def encode(packet: Packet) -> bytes:
    """The payload. The caller keeps it within PAYLOAD_BYTES_MAX; see encode_head and encode_record."""
    return b"".join([encode_head(packet.sender, packet.message), *map(encode_record, packet.records)])


def encode_head(sender: str, message: Message) -> bytes:
    """A payload without records; encoded records are appended to it."""
    match message:
        case Ping(sequence, target):
            fields: list[object] = [_PING, sender, sequence, target]
        case Ack(sequence, target):
            fields = [_ACK, sender, sequence, target]
        case PingRequest(sequence, target, address):
            fields = [_PING_REQUEST, sender, sequence, target, pack_address(address)]
        case Nack(sequence):
            fields = [_NACK, sender, sequence]
        case Rumour():
            fields = [_RUMOUR, sender]
        case Digest(low, high, entries, is_reply):
            packed = [[e.id_hash, e.generation, e.version, int(e.status), e.profile_version] for e in entries]
            fields = [_DIGEST, sender, low, high, packed, is_reply]
        case Delta(join_sequence):
            fields = [_DELTA, sender, join_sequence]
        case Join(sequence, protocol_min, protocol_max):
            fields = [_JOIN, sender, sequence, protocol_min, protocol_max]
        case Leave():
            fields = [_LEAVE, sender]
        case _:
            assert_never(message)
    encoded: bytes = msgpack.packb(fields)
    return encoded


def digest_entry_bytes(entry: DigestEntry) -> int:
    """How much of a digest this entry takes."""
    return len(
        msgpack.packb([entry.id_hash, entry.generation, entry.version, int(entry.status), entry.profile_version])
    )


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
    if record.accusers:
        fields.append(record.accusers)
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
            records.append(_record(_array(unpacker.unpack(), 8)))
    except (msgpack.UnpackException, ValueError) as exc:  # ValueError: bad UTF-8, bad format, nested too deep
        raise MalformedDatagram(f"payload of {len(payload)} bytes is no msgpack: {exc!r}") from exc
    return Packet(text(head[1], NODE_ID_BYTES_MAX), _message(head), tuple(records))


def _message(head: Sequence[Any]) -> Message:
    kind = count(head[0])
    if kind not in _FIELD_COUNTS:
        raise MalformedDatagram(f"unknown message type {kind}")
    _array(head, _FIELD_COUNTS[kind])
    if kind == _PING:
        return Ping(count(head[2]), text(head[3], NODE_ID_BYTES_MAX))
    if kind == _ACK:
        return Ack(count(head[2]), text(head[3], NODE_ID_BYTES_MAX))
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
        return Digest(low, high, tuple(_digest_entry(_array(e, 5)) for e in entries), head[5])
    if kind == _DELTA:
        return Delta(count(head[2]))
    if kind == _JOIN:
        return Join(count(head[2]), count(head[3]), count(head[4]))
    return Leave() if kind == _LEAVE else Rumour()


_FIELD_COUNTS = {
    _PING: 4,
    _ACK: 4,
    _PING_REQUEST: 5,
    _NACK: 3,
    _RUMOUR: 2,
    _DIGEST: 6,
    _DELTA: 3,
    _JOIN: 5,
    _LEAVE: 2,
}


def _record(fields: Sequence[Any]) -> Record:
    status = _status(fields[3])
    accusers: tuple[int, ...] = ()
    if len(fields) > 8:
        hashes = _array(fields[8], 0)
        if len(hashes) > ACCUSERS_MAX or (hashes and status is not MemberStatus.SUSPECT):
            raise MalformedDatagram(f"{len(hashes)} accusers of a member that is {status.name}")
        accusers = tuple(sorted({count(h, HASH_MAX) for h in hashes}))
    return Record(
        node_id=text(fields[0], NODE_ID_BYTES_MAX),
        generation=count(fields[1]),
        version=count(fields[2]),
        status=status,
        address=unpack_address(fields[4]),
        warm_version=count(fields[5]),
        hot=_section(fields[6]),
        warm=_section(fields[7]),
        accusers=accusers,
    )


def _digest_entry(fields: Sequence[Any]) -> DigestEntry:
    return DigestEntry(
        count(fields[0], HASH_MAX), count(fields[1]), count(fields[2]), _status(fields[3]), count(fields[4])
    )


def _array(value: Any, length_min: int) -> Sequence[Any]:
    if not isinstance(value, list) or len(value) < length_min:
        raise MalformedDatagram(f"expected an array of at least {length_min}, got {type(value).__name__}")
    return value


def _section(value: Any) -> bytes | None:
    if value is not None and (not isinstance(value, bytes) or len(value) > SECTION_BYTES_MAX):
        raise MalformedDatagram(f"a section is at most {SECTION_BYTES_MAX} bytes, got a {type(value).__name__}")
    return value


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
