"""Signs of life: a version without its sections, four numbers in place of a record, for those who hold the sections."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import msgpack

LONG_HASH_BYTES = 8
LONG_HASH_MAX = 2 ** (8 * LONG_HASH_BYTES) - 1
# msgpack: an array of up to 65,535 elements.
_ARRAY_16 = b"\xdc"
HEADER_BYTES = 3


class Sign(NamedTuple):
    """The member of this long_hash() is ALIVE at this version, and nothing but the version has changed in the last
    `unchanged` ones. A tuple, since a packet has dozens of them and most say nothing new."""

    long_hash: int
    generation: int
    version: int
    unchanged: int


def long_hash(node_id: str) -> int:
    """64 bits that stand for a node id where two must not have one: they would keep each other alive."""
    return int.from_bytes(blake2b(node_id.encode(), digest_size=LONG_HASH_BYTES).digest(), "big")


def encode_sign(sign: Sign) -> bytes:
    encoded: bytes = b"".join(map(msgpack.packb, sign))
    return encoded


def with_signs(head: bytes, signs: Sequence[bytes]) -> bytes:
    """The head of a message (mesh.wire.encode_head) with encoded signs as its last field: HEADER_BYTES longer, and
    theirs."""
    assert 0x90 <= head[0] < 0x9F, "a head is a short array, of which the first byte tells the length"
    header = _ARRAY_16 + (len(Sign._fields) * len(signs)).to_bytes(2, "big")
    return b"".join((bytes((head[0] + 1,)), head[1:], header, *signs))
