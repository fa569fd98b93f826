"""Puts loaded weights on huge pages, where the kernel can: Linux 6.1 and later. Elsewhere it does nothing.

A decode step reads every weight once. On pages of 4 kB the address of each page has to be translated, on a virtual
machine twice, and the caches for that are far too small for hundreds of megabytes. ONNX Runtime takes its memory from
malloc, which asks for no huge pages, and Linux gives none unasked on most distributions; so they are asked for when the
weights are there. It copies the memory once, about a second for 2 GB.
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path

HUGE_PAGE_BYTES = 2 << 20  # of x86-64, and of arm64 with pages of 4 kB
MADV_COLLAPSE = 25  # linux/mman.h
REGION_BYTES_MIN = HUGE_PAGE_BYTES
STRETCH_BYTES = 64 << 20  # of one call, so that the time limit is kept
SECONDS_MAX = 10.0  # a model loads without the rest; that is some 20 GB
MAPS = Path("/proc/self/maps")

Regions = dict[int, int]


def private_regions() -> Regions:
    """This process's writable memory that belongs to no file: end by beginning. Empty where the kernel does not say."""
    if sys.platform != "linux":
        return {}
    regions: Regions = {}
    try:
        lines = MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    for line in lines:
        span, access, _, _, inode, *name = line.split(maxsplit=5)
        if access == "rw-p" and inode == "0" and (not name or name[0] == "[heap]"):
            begin, end = (int(bound, 16) for bound in span.split("-"))
            regions[begin] = end
    return regions


def collapse_new(before: Regions) -> int:
    """Put what has been allocated since private_regions() said `before` on huge pages. Returns how many bytes are.

    Blocks, without the interpreter lock. What the kernel refuses stays as it was; contents never change."""
    if sys.platform != "linux":
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    deadline = time.monotonic() + SECONDS_MAX
    collapsed = 0
    for begin, end in private_regions().items():
        if end - begin < REGION_BYTES_MIN or before.get(begin) == end:
            continue
        start, stop = -(-begin // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES, end // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        while start < stop and time.monotonic() < deadline:
            length = min(STRETCH_BYTES, stop - start)
            if madvise(start, length, MADV_COLLAPSE) == 0:
                collapsed += length
            start += length
    return collapsed
