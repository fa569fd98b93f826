"""What nodes say to each other in datagrams: records of members, and the messages beside them. mesh.wire makes bytes of
them."""

from __future__ import annotations

from dataclasses import dataclass

from mesh.signs import Sign
from mesh.view import Address, MemberStatus

# Versions of the protocol this node speaks; JOIN carries both, and meshes that share none do not mix.
PROTOCOL_MIN = 1
PROTOCOL_MAX = 1


@dataclass(frozen=True, slots=True)
class Record:
    """What the sender believes of one member: a claim, and sections of its state.

    hot: the load published at exactly this version. warm: the profile published at warm_version. bulk: what was
    published at bulk_version, at most SECTION_BYTES_MAX in a datagram and BULK_BYTES_MAX on a peer link. boot_id: of
    the process that lives this generation, beside a profile, so that whoever is told of it need not ask it to prove
    itself; empty for unknown. accusers: hashes of the ids of those who suspect it at this version, sorted; empty unless
    SUSPECT."""

    node_id: str
    generation: int
    version: int
    status: MemberStatus
    address: Address
    warm_version: int = 0
    hot: bytes | None = None
    warm: bytes | None = None
    accusers: tuple[int, ...] = ()
    bulk_version: int = 0
    bulk: bytes | None = None
    boot_id: bytes = b""


@dataclass(frozen=True, slots=True)
class Ping:
    """Are you there? Answered with Ack if `target` is the receiver."""

    sequence: int
    target: str


@dataclass(frozen=True, slots=True)
class Ack:
    """`target` answered the ping of this sequence; from itself or from who was asked to ping it.

    cookie: 0, or to be echoed like that of a Cookie."""

    sequence: int
    target: str
    cookie: int = 0


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
    """What the sender holds of one member: its claim, and which profile and bulk section it has of it (not which it has
    heard of)."""

    id_hash: int
    generation: int
    version: int
    status: MemberStatus
    profile_version: int
    bulk_version: int = 0


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


@dataclass(frozen=True, slots=True)
class Cookie:
    """The sender does not know the receiver's process, so it has ignored what came from it: prove by an echo that this
    is no recording and that the address is no forgery. The packet's sender is empty, so that it is never larger than
    the datagram that it answers."""

    cookie: int


@dataclass(frozen=True, slots=True)
class CookieEcho:
    """The cookie came back. join_sequence: of the Join that was answered with the cookie, and asked again hereby, or 0.

    The packet's sender is empty where the one who sent the cookie is not known either."""

    cookie: int
    join_sequence: int = 0


@dataclass(frozen=True, slots=True)
class Conflict:
    """Another process, at `address`, is heard under the receiver's name and has been for `known_ms` milliseconds: the
    receiver is fenced, which means that nothing is taken from it. join_sequence: the Join it answers, or 0."""

    known_ms: int
    address: Address
    join_sequence: int = 0


@dataclass(frozen=True, slots=True)
class Unknown:
    """A message of a later version."""


Message = (
    Ping | Ack | PingRequest | Nack | Rumour | Digest | Delta | Join | Leave | Cookie | CookieEcho | Conflict | Unknown
)

# The labels under which statistics count.
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
    Cookie: "cookie",
    CookieEcho: "cookie_echo",
    Conflict: "conflict",
    Unknown: "unknown",
}


@dataclass(frozen=True, slots=True)
class Packet:
    """One payload: who sent it, what it asks or says, and the records and signs of life that ride along."""

    sender: str
    message: Message
    records: tuple[Record, ...] = ()
    signs: tuple[Sign, ...] = ()
