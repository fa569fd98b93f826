"""Reads messages that are one msgpack array each, field by field, as peers send them over links: nothing is trusted.

Arrays may be longer than this version knows: what follows is ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgpack

from mesh.errors import MalformedDatagram


def unpack_array(message: bytes, bytes_max: int) -> list[Any]:
    """Raises MalformedDatagram."""
    if len(message) > bytes_max:
        raise MalformedDatagram(f"a message of {len(message)} bytes exceeds {bytes_max}")
    fields = unpack(message)
    if not isinstance(fields, list):
        raise MalformedDatagram(f"expected an array, got a {type(fields).__name__}")
    return fields


def unpack(encoded: Any) -> Any:
    """What is packed in a field, or in a message within its bounds. Raises MalformedDatagram."""
    if not isinstance(encoded, bytes):
        raise MalformedDatagram(f"expected packed bytes, got a {type(encoded).__name__}")
    try:
        return msgpack.unpackb(encoded)
    except ValueError as exc:  # msgpack's errors for one complete buffer, bad UTF-8 included
        raise MalformedDatagram(f"{len(encoded)} bytes are no msgpack: {exc!r}") from exc


def field(fields: Sequence[Any], index: int) -> Any:
    """Raises MalformedDatagram."""
    if len(fields) <= index:
        raise MalformedDatagram(f"a message of {len(fields)} fields where at least {index + 1} are needed")
    return fields[index]


def items(fields: Sequence[Any], index: int, length_max: int) -> list[Any]:
    """A field that is an array itself. Raises MalformedDatagram."""
    value = field(fields, index)
    if not isinstance(value, list) or len(value) > length_max:
        raise MalformedDatagram(f"expected an array of at most {length_max}, got a {type(value).__name__}")
    return value
