"""Mutations of inputs from one seeded source: of bytes, and of the msgpack objects that the bytes encode."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import msgpack

INPUT_BYTES_MAX = 4_096
# First bytes of msgpack forms at their limits, and lengths that promise more than follows.
TOKENS = (
    b"\xc0", b"\xc1", b"\xc2", b"\x80", b"\x90", b"\xa0", b"\xc4\x00", b"\xc4\xff", b"\xca\x7f\xc0\x00\x00",
    b"\xcb\x7f\xf0" + bytes(6), b"\xcf" + b"\xff" * 8, b"\xcf\x7f" + b"\xff" * 7, b"\xd3" + b"\xff" * 8,
    b"\xd4\xff\x00", b"\xd7\xff" + b"\xff" * 8, b"\xdc\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff",
    b"\xdb\x00\x00\x00\x01\xff", b"\xd9\x02\xed\xa0", b"\x81\xc0\xc0", b"\x81\x90\xc0",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 127, 128, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 0.0, -0.0,
    1.5, 1e300, -1e300, float("inf"), float("nan"), "", "a", "b", "x" * 64, "x" * 65, "é" * 40, "\x00", "a\nb", b"",
    b"\x00" * 6, b"\xff" * 18, b"z" * 900, [], [[]], [None] * 90, {}, {"a": 1}, {1: 2, 3: 4}, msgpack.ExtType(5, b"x"),
    msgpack.Timestamp(1, 2),
)  # fmt: skip


class Mutator:
    """Draws inputs from seeds; the same seed draws the same inputs."""

    def __init__(self, seeds: Sequence[bytes], rng: random.Random) -> None:
        self._seeds = list(seeds)
        self._rng = rng

    def draw(self) -> bytes:
        """One input: random bytes, a seed as it is, or a mutated one."""
        rng = self._rng
        kind = rng.random()
        if kind < 0.05:
            return rng.randbytes(rng.randrange(200))
        start = rng.choice(self._seeds)
        return start if kind < 0.10 else self.mutated(start)

    def mutated(self, start: bytes) -> bytes:
        """The first byte, which chooses how a subject takes an input, mostly stays."""
        rng = self._rng
        head, body = start[:1], start[1:]
        if rng.random() < 0.15:
            head = rng.randbytes(1)
        if rng.random() < 0.5:
            return head + self._reshaped(body)
        mutated = bytearray(body)
        for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
            self._mutate(mutated)
        return head + bytes(mutated[:INPUT_BYTES_MAX])

    def _mutate(self, data: bytearray) -> None:
        rng = self._rng
        at = rng.randrange(len(data) + 1)
        operation = rng.randrange(8)
        if operation == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif operation == 1 and at < len(data):
            data[at] = rng.randrange(256)
        elif operation == 2:
            data[at:at] = rng.choice(TOKENS)
        elif operation == 3:
            token = rng.choice(TOKENS)
            data[at : at + len(token)] = token
        elif operation == 4:
            del data[at : at + rng.randrange(1, 16)]
        elif operation == 5:
            del data[at:]
        elif operation == 6:
            other = rng.choice(self._seeds)
            data[at:at] = other[rng.randrange(len(other)) :]
        else:
            data[at:at] = data[at : at + rng.randrange(1, 64)] * rng.randrange(1, 8)

    def _reshaped(self, body: bytes) -> bytes:
        """Some values within the objects replaced, removed, doubled or moved; bytes are mutated where that fails."""
        rng = self._rng
        unpacker = msgpack.Unpacker(strict_map_key=False)
        unpacker.feed(body)
        try:
            objects = list(unpacker)
        except ValueError:
            objects = []
        for _ in range(rng.choice((1, 1, 2, 3))):
            holder = self._some_list(objects)
            index = rng.randrange(len(holder)) if holder else 0
            operation = rng.randrange(6)
            if not holder or operation == 0:
                holder.insert(index, rng.choice(VALUES))
            elif operation == 1:
                del holder[index]
            elif operation == 2:
                holder.append(holder[index])
            elif operation == 3 and isinstance(holder[index], int):
                holder[index] = max(-(2**63), min(2**64 - 1, holder[index] + rng.choice((-1, 1, 2, 1000))))
            else:
                holder[index] = rng.choice(VALUES)
        packed = [bytes(msgpack.packb(o, use_single_float=rng.random() < 0.5)) for o in objects]
        return b"".join(packed)[:INPUT_BYTES_MAX]

    def _some_list(self, objects: list[Any]) -> list[Any]:
        """A list somewhere within, the outermost at times. A section's bytes are left to byte mutations."""
        rng = self._rng
        chosen = objects
        while (inner := [o for o in chosen if isinstance(o, list)]) and (chosen is objects or rng.random() < 0.4):
            if chosen is objects and rng.random() < 0.1:
                break
            chosen = rng.choice(inner)
        return chosen
