"""Other versions of the protocol, as a payload that this version encoded and a later one would have."""

from __future__ import annotations

from typing import Any

import msgpack

from mesh import packets, wire
from mesh.seal import DatagramSealer, Opened
from tests.simulation.shortcuts import StandInSealer
from tests.simulation.sim_node import Dialect

JOIN = 8  # the number of Join on the wire; its fields 3 and 4 are the protocol versions spoken


class DialectSealer:
    """Seals what the dialect makes of each payload."""

    def __init__(self, sealer: DatagramSealer | StandInSealer, dialect: Dialect) -> None:
        self._sealer = sealer
        self._dialect = dialect
        self._boots = sealer._boots

    def seal(self, payload: bytes) -> bytes:
        return self._sealer.seal(self._dialect(payload))

    def open(self, datagram: bytes) -> Opened:
        return self._sealer.open(datagram)

    def admit(self, opened: Opened) -> None:
        self._sealer.admit(opened)

    def admit_process(self, boot_id: bytes) -> None:
        self._sealer.admit_process(boot_id)


def later(payload: bytes) -> bytes:
    """The next version, which still speaks this one: more fields at the end of messages, as far as they fit."""
    return _rewritten(payload, protocol_min=packets.PROTOCOL_MIN)


def incompatible(payload: bytes) -> bytes:
    """A version that no longer speaks this one."""
    return _rewritten(payload, protocol_min=packets.PROTOCOL_MAX + 1)


def _rewritten(payload: bytes, protocol_min: int) -> bytes:
    unpacker = msgpack.Unpacker()
    unpacker.feed(payload)
    head: list[Any] = unpacker.unpack()
    rest = payload[unpacker.tell() :]
    if head[0] == JOIN:
        head[3], head[4] = protocol_min, packets.PROTOCOL_MAX + 1
    signs = [] if isinstance(head[-1], list) else [[]]
    longer = msgpack.packb([*head, *signs, {"later": [1, 2, 3]}]) + rest
    return longer if len(longer) <= wire.PAYLOAD_BYTES_MAX else msgpack.packb(head) + rest
