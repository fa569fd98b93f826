"""What one node knows of one member, and how it tells others of it. mesh.membership decides what is believed."""

from __future__ import annotations

import zlib
from dataclasses import replace

from mesh.packets import DigestEntry, Record
from mesh.signs import Sign, encode_sign, long_hash
from mesh.view import Address, MemberStatus, MemberView, NodeLoad, NodeProfile
from mesh.wire import ACCUSERS_MAX, BULK_INLINE_BYTES_MAX, HASH_MAX, SECTION_BYTES_MAX, encode_record

LIVE = (MemberStatus.ALIVE, MemberStatus.SUSPECT)


class Member:
    """One row. Only the table changes it; `load` alone may be replaced by a fresher one that came another way."""

    __slots__ = (
        "_encoded",
        "_encoded_sign",
        "accusers",
        "address",
        "advanced_at",
        "boot_id",
        "bulk",
        "bulk_version",
        "bulk_version_heard",
        "generation",
        "hot",
        "hot_load",
        "hot_since",
        "id_hash",
        "known_since",
        "load",
        "load_at",
        "load_version",
        "long_hash",
        "node_id",
        "profile",
        "profile_version",
        "status",
        "suspected_at",
        "told_by",
        "version",
        "warm",
        "warm_version",
    )

    def __init__(self, record: Record, now: float) -> None:
        self.node_id = record.node_id
        self.id_hash = id_hash(record.node_id)
        self.long_hash = long_hash(record.node_id)
        self.address = record.address
        self.generation = record.generation
        self.version = record.version
        self.status = record.status
        self.accusers = record.accusers
        self.warm_version = record.warm_version  # the newest heard of
        self.profile_version = 0  # the one held
        self.load_version = 0
        self.load = NodeLoad()
        self.profile = NodeProfile()
        self.hot: bytes | None = None
        self.hot_load = NodeLoad()  # what `hot` says; `load` may be fresher
        self.hot_since = 0  # nothing but the version has changed from this one to `version`; 0: it is not known
        self.warm: bytes | None = None
        self.bulk = b""
        self.bulk_version = 0  # the one held
        self.bulk_version_heard = record.bulk_version  # the newest heard of
        self.known_since = now  # this life of it
        self.advanced_at = now
        self.load_at = now
        self.suspected_at = now  # meaningful while SUSPECT
        self.told_by = ""  # the peer that last told news of it, who need not be told
        self.boot_id = record.boot_id  # of the process that speaks for it, once heard of
        self._encoded: dict[tuple[bool, bool], bytes] = {}
        self._encoded_sign = b""

    @property
    def is_live(self) -> bool:
        return self.status in LIVE

    @property
    def lacks_load(self) -> bool:
        """A sign of life told of a load that has not come: whoever holds it is to be asked."""
        return self.hot_since > self.load_version

    @property
    def is_bulk_news(self) -> bool:
        """The bulk section was published at the version claimed, and fits a datagram: it goes along with the load."""
        return 0 < self.bulk_version == self.version and len(self.bulk) <= BULK_INLINE_BYTES_MAX

    def record(self, *, with_warm: bool, with_bulk: bool) -> Record:
        """What this node tells others of it. The hot section rides only while it is of the claimed version, and only
        where the others leave room for it in a datagram; so does bulk beside warm, unless it fits none anyway."""
        hot = self.hot if self.load_version == self.version else None
        warm = self.warm if with_warm and self.profile_version == self.warm_version else None
        bulk = self.bulk if with_bulk and self.bulk_version == self.bulk_version_heard else None
        if bulk is not None and warm is not None and BULK_INLINE_BYTES_MAX >= len(bulk) > SECTION_BYTES_MAX - len(warm):
            bulk = None
        if hot is not None and len(hot) + len(warm or b"") + len(bulk or b"") > SECTION_BYTES_MAX:
            hot = None
        return Record(
            node_id=self.node_id,
            generation=self.generation,
            version=self.version,
            status=self.status,
            address=self.address,
            warm_version=self.warm_version,
            hot=hot,
            warm=warm,
            accusers=self.accusers,
            bulk_version=self.bulk_version_heard,
            bulk=bulk,
            boot_id=self.boot_id if with_warm else b"",
        )

    def accusation(self, status: MemberStatus, accusers: tuple[int, ...]) -> Record:
        """The claim that it is SUSPECT or DEAD at the version known."""
        return Record(
            self.node_id,
            self.generation,
            self.version,
            status,
            self.address,
            self.warm_version,
            accusers=accusers,
            bulk_version=self.bulk_version_heard,
        )

    def encoded(self, *, with_warm: bool, with_bulk: bool | None = None) -> bytes:
        """record() as bytes, encoded once per change. with_bulk: left out, where it is news."""
        kind = (with_warm, self.is_bulk_news if with_bulk is None else with_bulk)
        if kind[1] and len(self.bulk) > BULK_INLINE_BYTES_MAX:
            return encode_record(self.record(with_warm=kind[0], with_bulk=True))  # too much to keep a second time
        encoded = self._encoded.get(kind)
        if encoded is None:
            encoded = self._encoded[kind] = encode_record(self.record(with_warm=kind[0], with_bulk=kind[1]))
        return encoded

    def encoded_sign(self) -> bytes:
        """Its newest version as a sign of life, encoded once per change. Empty where that needs a record: it is not
        ALIVE, has changed its load in this version, or whether it has is not known."""
        if self.status is not MemberStatus.ALIVE or not 0 < self.hot_since < self.version:
            return b""
        if not self._encoded_sign:
            unchanged = self.version - self.hot_since
            self._encoded_sign = encode_sign(Sign(self.long_hash, self.generation, self.version, unchanged))
        return self._encoded_sign

    def know_unchanged(self, sign: Sign) -> None:
        """What a sign of life that was merged says of the version known."""
        since = sign.version - sign.unchanged
        is_current = (sign.generation, sign.version) == (self.generation, self.version)
        if is_current and since > 0 and not 0 < self.hot_since <= since:
            self.hot_since = since
            self._encoded_sign = b""

    def touched(self) -> None:
        self._encoded.clear()
        self._encoded_sign = b""

    def digest_entry(self) -> DigestEntry:
        return DigestEntry(
            self.id_hash, self.generation, self.version, self.status, self.profile_version, self.bulk_version
        )

    def asking_entry(self) -> DigestEntry:
        """digest_entry() as it is sent to ask for what is newer: anything is, while a load is lacked."""
        entry = self.digest_entry()
        return replace(entry, version=0) if self.lacks_load and self.is_live else entry

    def view(self, now: float, *, is_self: bool) -> MemberView:
        return MemberView(
            node_id=self.node_id,
            address=self.address,
            status=self.status,
            generation=self.generation,
            version=self.version,
            load=self.load,
            profile=self.profile,
            age_s=0.0 if is_self else max(0.0, now - self.advanced_at),
            is_self=is_self,
            load_age_s=0.0 if is_self else max(0.0, now - self.load_at),
            load_version=self.load_version,
            bulk=self.bulk,
            bulk_version=self.bulk_version,
        )


def own_member(node_id: str, generation: int, address: Address, boot_id: bytes, now: float) -> Member:
    """The row of the node itself, before its first publication."""
    return Member(Record(node_id, generation, 0, MemberStatus.ALIVE, address, boot_id=boot_id), now)


def sign_record(member: Member, sign: Sign) -> Record:
    """The record for which a sign stands to one who holds this row: with the load, where that held is of a version
    since which it did not change."""
    is_load_held = member.load_version >= sign.version - sign.unchanged > 0
    return Record(
        member.node_id,
        sign.generation,
        sign.version,
        MemberStatus.ALIVE,
        member.address,
        member.warm_version,
        member.hot if is_load_held else None,
        bulk_version=member.bulk_version_heard,
    )


def join_accusers(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """The smallest ACCUSERS_MAX of both: bounded, and the same in whatever order they come together."""
    return tuple(sorted({*a, *b})[:ACCUSERS_MAX])


def id_hash(node_id: str) -> int:
    """32 bits that stand for a node id in digests and accusations. Of two equal ones digests see the later alone; the
    exchange over peer links goes by names."""
    return zlib.crc32(node_id.encode()) & HASH_MAX
