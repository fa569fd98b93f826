"""How many slots of how many tokens fit into the memory that is there, beside the weights. Sizes in bytes.

Memory of the host is what the kernel calls available, or what is left below a control group's limit where that is
less: containers see the host's figures in /proc/meminfo and are killed at their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SLOTS_DEFAULT_MAX = 8
# Slots hold at most this many tokens unless told otherwise: KV of a 128k context would not fit beside the weights.
CAPACITY_DEFAULT_MAX = 8192
CAPACITY_USEFUL_MIN = 1024  # a chat of a few turns: below it, slots are given up before tokens
CAPACITY_MIN = 64  # one chunk
# Loading takes 1.28 times the file at its peak (200M parameters: 982 MB for 766 fp32; 0.8 for int4), and 1.05 after.
WEIGHTS_NUMERATOR, WEIGHTS_DENOMINATOR = 5, 4
HEADROOM_BYTES = 128 * 1024 * 1024  # activations, logits and what else the process grows by
MIB = 1024 * 1024
CGROUP_DEPTH_MAX = 32


class MemoryTooSmall(Exception):
    """What was asked for does not fit. fix: what would, as an instruction."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.fix = fix


@dataclass(frozen=True, slots=True)
class KvNeeds:
    """bytes_per_row: of one token in one slot. capacity_most: tokens that a slot may have at all; capacity_least: that
    it must have. capacity_default: where neither memory nor the operator says otherwise."""

    weight_bytes: int
    bytes_per_row: int
    capacity_least: int
    capacity_default: int
    capacity_most: int


@dataclass(frozen=True, slots=True)
class KvPlan:
    """reason: what decided, for the log."""

    slots: int
    capacity: int
    kv_bytes: int
    reason: str


def plan_kv(
    needs: KvNeeds, *, slots: int | None, capacity: int | None, available_bytes: int | None, limit_bytes: int | None
) -> KvPlan:
    """Slots and capacity as given, and as large as fits where they are None.

    A capacity is never above needs.capacity_most. available_bytes: None where nobody knows. limit_bytes: for weights
    and KV together, None for all that is available. Raises MemoryTooSmall."""
    assert slots is None or slots > 0, f"{slots} slots"
    assert capacity is None or capacity > 0, f"a capacity of {capacity}"
    source = "the memory limit"
    total = limit_bytes
    if available_bytes is not None and (total is None or available_bytes < total):
        source, total = "available memory", available_bytes
    first = _Choice(slots or SLOTS_DEFAULT_MAX, min(capacity or needs.capacity_default, needs.capacity_most))
    if total is None:
        return _plan(needs, first, "the memory of this machine is not known")
    weights = needs.weight_bytes * WEIGHTS_NUMERATOR // WEIGHTS_DENOMINATOR
    room = total - weights - HEADROOM_BYTES
    described = f"{source} of {total // MIB} MiB"
    if first.bytes(needs) <= room:
        return _plan(needs, first, f"fits into {described}")
    least_slots = 1 if slots is None else slots
    least_capacity = min(needs.capacity_least, first.capacity) if capacity is None else first.capacity
    for choice in _smaller(first, least_slots, least_capacity):
        if choice.bytes(needs) <= room:
            return _plan(needs, choice, f"the most that fits into {described}")
    raise _too_small(needs, _Choice(least_slots, least_capacity), weights, room, described)


@dataclass(frozen=True, slots=True)
class _Choice:
    slots: int
    capacity: int

    def bytes(self, needs: KvNeeds) -> int:
        return self.slots * self.capacity * needs.bytes_per_row


def _smaller(choice: _Choice, least_slots: int, least_capacity: int) -> Iterator[_Choice]:
    """Half the capacity down to what is useful, then half the slots, then half the capacity again."""
    slots, capacity = choice.slots, choice.capacity
    for floor in (max(CAPACITY_USEFUL_MIN, least_capacity), least_capacity):
        while capacity > floor:
            capacity = max(capacity // 2, floor)
            yield _Choice(slots, capacity)
        while slots > least_slots:
            slots = max(slots // 2, least_slots)
            yield _Choice(slots, capacity)


def _plan(needs: KvNeeds, choice: _Choice, reason: str) -> KvPlan:
    return KvPlan(choice.slots, choice.capacity, choice.bytes(needs), reason)


def _too_small(needs: KvNeeds, least: _Choice, weights: int, room: int, described: str) -> MemoryTooSmall:
    reason = (
        f"{least.slots} slots of {least.capacity} tokens take {-(-least.bytes(needs) // MIB)} MiB beside "
        f"{-(-weights // MIB)} MiB for the weights and {HEADROOM_BYTES // MIB} MiB for running, more than {described}"
    )
    tokens = max(room, 0) // needs.bytes_per_row
    if tokens // least.slots >= needs.capacity_least:
        return MemoryTooSmall(reason, f"{least.slots} slots would fit with a capacity of {tokens // least.slots}")
    if tokens >= needs.capacity_least:
        capacity = max(min(least.capacity, tokens), needs.capacity_least)
        return MemoryTooSmall(reason, f"{max(tokens // capacity, 1)} slots with a capacity of {capacity} would fit")
    needed = weights + HEADROOM_BYTES + needs.capacity_least * needs.bytes_per_row
    return MemoryTooSmall(reason, f"give it {-(-needed // MIB)} MiB, or take a smaller variant of the model")


def available_host_bytes(root: Path = Path("/")) -> int | None:
    """None where the system does not say. root: where /proc and /sys are."""
    figures = [_memory_available(root), *_group_rooms(root)]
    return min((figure for figure in figures if figure is not None), default=None)


def _memory_available(root: Path) -> int | None:
    for line in _lines(root / "proc/meminfo"):
        name, _, value = line.partition(":")
        if name == "MemAvailable" and (words := value.split()) and words[0].isdecimal():
            return int(words[0]) * 1024
    return None


def _group_rooms(root: Path) -> Iterator[int]:
    """What is left below the limit of this process's control group and of each one above it, of versions 1 and 2."""
    mount = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            base, names = mount, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = mount / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # A container may see its own group as the root: the path is then of another mount and not there.
        relative = Path(path.strip("/"))
        for group in [relative, *relative.parents][:CGROUP_DEPTH_MAX]:
            room = _room(base / group, *names)
            if room is not None:
                yield room


def _room(group: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    limit, usage = _number(group / limit_name), _number(group / usage_name)
    if limit is None or usage is None:
        return None
    cache = 0  # of files, which the kernel gives back before it kills
    for line in _lines(group / "memory.stat"):
        name, _, value = line.partition(" ")
        if name == cache_name and value.strip().isdecimal():
            cache = int(value)
    return max(limit - usage + cache, 0)


def _number(file: Path) -> int | None:
    """None also for `max`, which means no limit."""
    first = next(iter(_lines(file)), "").strip()
    return int(first) if first.isdecimal() else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
