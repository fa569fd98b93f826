"""Mutations of inputs from one seeded source: of bytes, and of the msgpack objects that the bytes encode."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import msgpack

INPUT_BYTES_MAX = 4_096
CONTAINERS_MAX = 100  # looked at within one input, also where it holds itself over and over
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
            data[at:at] = data[at : at + rng.randrange(1, 64)] * rng.choice((1, 2, 4, 64))

    def _reshaped(self, body: bytes) -> bytes:
        """Some values within the objects replaced, removed, doubled or moved; bytes are mutated where that fails."""
        rng = self._rng
        unpacker = msgpack.Unpacker(strict_map_key=False)
        unpacker.feed(body)
        try:
            objects = list(unpacker)
        except (ValueError, TypeError):  # TypeError: a map's key that is a map
            objects = []
        for _ in range(rng.choice((1, 1, 2, 3))):
            holder = rng.choice(_containers(objects))
            if isinstance(holder, dict):
                self._change_map(holder)
            else:
                self._change_list(holder)
        packed = [bytes(msgpack.packb(o)) for o in objects]
        return b"".join(packed)[:INPUT_BYTES_MAX]

    def _value(self) -> Any:
        """At a limit, of a wrong type, or a number or name that fits."""
        rng = self._rng
        fitting = rng.random()
        if fitting < 0.15:
            return rng.getrandbits(rng.randrange(1, 20))
        if fitting < 0.25:
            return "".join(rng.choices("abcdefgh", k=rng.randrange(1, 5)))
        return copy.deepcopy(rng.choice(VALUES))

    def _change_list(self, holder: list[Any]) -> None:
        rng = self._rng
        index = rng.randrange(len(holder)) if holder else 0
        operation = rng.randrange(6)
        if not holder or operation == 0:
            holder.insert(index, self._value())
        elif operation == 1:
            del holder[index]
        elif operation == 2:
            holder.append(holder[index])
        elif operation == 3 and isinstance(holder[index], int):
            holder[index] = max(-(2**63), min(2**64 - 1, holder[index] + rng.choice((-1, 1, 2, 1000))))
        else:
            holder[index] = self._value()

    def _change_map(self, holder: dict[Any, Any]) -> None:
        rng = self._rng
        key = rng.choice(list(holder)) if holder else "a"
        if rng.random() < 0.3:
            holder.pop(key, None)
        else:
            holder[key] = self._value()


def _containers(objects: list[Any]) -> list[list[Any] | dict[Any, Any]]:
    """All lists and maps within, the outermost first, up to a number. A section's bytes are left to byte mutations."""
    found: list[list[Any] | dict[Any, Any]] = [objects]
    for holder in found:
        inner = holder.values() if isinstance(holder, dict) else holder
        found += [o for o in inner if isinstance(o, (list, dict))][: CONTAINERS_MAX - len(found)]
    return found
