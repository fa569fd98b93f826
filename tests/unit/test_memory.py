"""Slots and capacity that fit, and where the figures of a machine's memory come from."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodes.engine.memory import (
    HEADROOM_BYTES,
    MIB,
    SLOTS_DEFAULT_MAX,
    KvNeeds,
    MemoryTooSmall,
    available_host_bytes,
    plan_kv,
)

ROW = 64 * 1024
WEIGHTS = 1000 * MIB
BESIDE_KV = WEIGHTS * 5 // 4 + HEADROOM_BYTES
NEEDS = KvNeeds(WEIGHTS, ROW, capacity_least=64, capacity_default=8192, capacity_most=32_768)
SLOT_OF_1024 = 1024 * ROW


@pytest.mark.parametrize(
    ("room", "slots", "capacity", "expected"),
    [
        (64 * SLOT_OF_1024, None, None, (8, 8192)),
        (64 * SLOT_OF_1024 - 1, None, None, (8, 4096)),
        (8 * SLOT_OF_1024, None, None, (8, 1024)),
        (8 * SLOT_OF_1024 - 1, None, None, (4, 1024)),
        (SLOT_OF_1024 // 2, None, None, (1, 512)),
        (64 * ROW, None, None, (1, 64)),
        (8 * SLOT_OF_1024, None, 4096, (2, 4096)),
        (8 * SLOT_OF_1024, 16, None, (16, 512)),
        (8 * SLOT_OF_1024, 2, 4096, (2, 4096)),
        (64 * SLOT_OF_1024, 1, 99_999, (1, 32_768)),
    ],
)  # fmt: skip
def test_capacity_is_halved_before_slots_and_what_was_given_stays(
    room: int, slots: int | None, capacity: int | None, expected: tuple[int, int]
) -> None:
    plan = plan_kv(NEEDS, slots=slots, capacity=capacity, available_bytes=BESIDE_KV + room, limit_bytes=None)
    assert (plan.slots, plan.capacity) == expected
    assert plan.kv_bytes == plan.slots * plan.capacity * ROW
    assert "available memory" in plan.reason


def test_the_least_of_limit_and_available_memory_counts() -> None:
    one, two = BESIDE_KV + 8 * SLOT_OF_1024, BESIDE_KV + 16 * SLOT_OF_1024
    limited = plan_kv(NEEDS, slots=None, capacity=None, available_bytes=two, limit_bytes=one)
    assert limited.capacity == 1024
    assert "memory limit" in limited.reason
    available = plan_kv(NEEDS, slots=None, capacity=None, available_bytes=one, limit_bytes=two)
    assert available.capacity == 1024
    assert "available memory" in available.reason


def test_defaults_are_taken_where_nobody_knows_the_memory() -> None:
    plan = plan_kv(NEEDS, slots=None, capacity=None, available_bytes=None, limit_bytes=None)
    assert (plan.slots, plan.capacity) == (SLOTS_DEFAULT_MAX, 8192)


@pytest.mark.parametrize(
    ("room", "slots", "capacity", "fix"),
    [
        (8 * SLOT_OF_1024, 8, 8192, "8 slots would fit with a capacity of 1024"),
        (100 * ROW, 8, 8192, "1 slots with a capacity of 100 would fit"),
        (63 * ROW, None, None, f"give it {(BESIDE_KV + 64 * ROW) // MIB} MiB, or take a smaller variant"),
        (-BESIDE_KV, 1, 64, "take a smaller variant"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(
    room: int, slots: int | None, capacity: int | None, fix: str
) -> None:
    with pytest.raises(MemoryTooSmall) as raised:
        plan_kv(NEEDS, slots=slots, capacity=capacity, available_bytes=BESIDE_KV + room, limit_bytes=None)
    assert fix in raised.value.fix
    assert "available memory of" in raised.value.reason


@given(
    room=st.integers(0, 100 * SLOT_OF_1024),
    slots=st.none() | st.integers(1, 256),
    capacity=st.none() | st.integers(1, 40_000),
    least=st.integers(1, 8192),
)
def test_a_plan_fits_and_is_within_the_bounds(room: int, slots: int | None, capacity: int | None, least: int) -> None:
    needs = KvNeeds(WEIGHTS, ROW, capacity_least=least, capacity_default=8192, capacity_most=32_768)
    try:
        plan = plan_kv(needs, slots=slots, capacity=capacity, available_bytes=BESIDE_KV + room, limit_bytes=None)
    except MemoryTooSmall:
        assert room < (slots or 1) * (min(capacity, 32_768) if capacity else least) * ROW
        return
    assert plan.kv_bytes <= room
    assert slots is None or plan.slots == slots
    assert plan.capacity == min(capacity, 32_768) if capacity else least <= plan.capacity <= 8192


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:  9000 kB\nMemAvailable:    5000 kB\n"}
ROOT_GROUP = {"proc/self/cgroup": "0::/\n"}
NO_LIMIT = {"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "1\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/meminfo": "MemTotal: 9000 kB\n"}, None),
        (MEMINFO, 5_120_000),
        (MEMINFO | ROOT_GROUP | NO_LIMIT, 5_120_000),
        (
            MEMINFO
            | ROOT_GROUP
            | {
                "sys/fs/cgroup/memory.max": "3000\n",
                "sys/fs/cgroup/memory.current": "2500\n",
                "sys/fs/cgroup/memory.stat": "anon 2000\ninactive_file 400\n",
            },
            900,
        ),
        (
            MEMINFO
            | {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/memory.max": "2000\n",
                "sys/fs/cgroup/a/memory.current": "500\n",
                "sys/fs/cgroup/a/b/memory.max": "9000\n",
                "sys/fs/cgroup/a/b/memory.current": "500\n",
            },
            1500,
        ),
        (
            MEMINFO
            | {
                "proc/self/cgroup": "9:cpu,cpuacct:/x\n4:memory:/not/seen/here\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "4000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "4100\n",
            },
            0,
        ),
    ],
    ids=["nothing", "old kernel", "no group", "no limit", "a limit", "the parent's limit", "version 1, over it"],
)  # fmt: skip
def test_available_memory_is_what_the_tightest_limit_leaves(
    tmp_path: Path, files: dict[str, str], expected: int | None
) -> None:
    assert available_host_bytes(machine(tmp_path, files)) == expected
