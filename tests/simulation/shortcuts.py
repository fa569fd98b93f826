"""What lets a thousand cores run in one process: decoded records shared, and a cheap seal in place of AES-GCM.

Neither decides anything. The caches return what the production decoder returned for equal fields; the stand-in keeps
the header, the length, the replay window and the reasons of refusal of the real seal, and checks a CRC in place of the
tag. Runs of up to STAND_IN_NODES nodes seal for real."""

from __future__ import annotations

import gc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import mesh.membership
from mesh import packets, wire
from mesh.errors import SealRejected
from mesh.seal import HEADER, OVERHEAD_BYTES, SEAL_VERSION, TAG_BYTES, Opened

STAND_IN_NODES = 50  # beyond it datagrams are sealed by the stand-in
RECORDS_MAX = 200_000  # decoded records kept; some seconds of 1,000 nodes


class StandInSealer:
    """Seals like mesh.seal.DatagramSealer, for nobody who means harm."""

    def __init__(self, boot_id: bytes) -> None:
        self._boot_id = boot_id
        self._counter = 0
        self._boots: dict[bytes, list[int]] = {}  # of admitted ones the highest counter and a map of those before it

    def seal(self, payload: bytes) -> bytes:
        self._counter += 1
        header = HEADER.pack(SEAL_VERSION, b"mock", self._boot_id, self._counter)
        return header + payload + zlib.crc32(payload).to_bytes(TAG_BYTES, "big")

    def open(self, datagram: bytes) -> Opened:
        if len(datagram) < OVERHEAD_BYTES:
            raise SealRejected("truncated")
        _, _, boot_id, counter = HEADER.unpack_from(datagram)
        if boot_id == self._boot_id:
            raise SealRejected("reflected")
        window = self._boots.get(boot_id)
        ahead = counter - window[0] if window else 0
        if window and ahead <= 0 and (ahead <= -60 or window[1] >> -ahead & 1):
            raise SealRejected("replayed")
        payload = datagram[HEADER.size : -TAG_BYTES]
        if zlib.crc32(payload) != int.from_bytes(datagram[-TAG_BYTES:], "big"):
            raise SealRejected("tampered")
        opened = Opened(boot_id, counter, payload, window is not None)
        if window:
            self._mark_seen(window, counter)
        return opened

    def admit(self, opened: Opened) -> None:
        self.admit_process(opened.boot_id)
        self._mark_seen(self._boots[opened.boot_id], opened.counter)

    def admit_process(self, boot_id: bytes) -> None:
        self._boots.setdefault(boot_id, [0, 0])

    def _mark_seen(self, window: list[int], counter: int) -> None:
        ahead = counter - window[0]
        if ahead > 0:
            # 60 bits and not 1,024: they fit a small integer, and nothing overtakes by more here.
            window[0], window[1] = counter, (window[1] << min(ahead, 60) | 1) & (1 << 60) - 1
        else:
            window[1] |= 1 << -ahead


@contextmanager
def shared_decoding() -> Iterator[None]:
    """While it lasts all cores of this process share what the decoders made of equal bytes."""
    records: dict[tuple[Any, ...], packets.Record] = {}
    decode_record: Callable[..., packets.Record] = wire.unpack_record

    def record(fields: Any, *limit: int) -> packets.Record:
        key = tuple(fields)
        try:
            found = records.get(key)
        except TypeError:  # accusers are a list: rare, and decoded each time
            return decode_record(fields, *limit)
        if found is None:
            if len(records) >= RECORDS_MAX:
                records.clear()
            found = records[key] = decode_record(fields, *limit)
        return found

    former = mesh.membership.decode_load, mesh.membership.decode_profile
    wire.unpack_record = record
    mesh.membership.decode_load = lru_cache(RECORDS_MAX)(former[0])
    mesh.membership.decode_profile = lru_cache(RECORDS_MAX)(former[1])
    try:
        yield
    finally:
        wire.unpack_record = decode_record
        mesh.membership.decode_load, mesh.membership.decode_profile = former


@contextmanager
def rare_collections(node_count: int) -> Iterator[None]:
    """In a large world the garbage collector would spend most of the time walking millions of rows that all live."""
    if node_count > STAND_IN_NODES:
        gc.disable()
    try:
        yield
    finally:
        gc.enable()
