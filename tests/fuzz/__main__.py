"""Fuzzing of all that peers and strangers can send, with seeded mutations of valid input.

    python -m tests.fuzz [--inputs 1000000] [--seed 7] [--subject datagram|link|section]

Prints a JSON line for each subject: how often each outcome came up, and how memory grew. A fault ends it with the
input in hex and the command that takes that input again. `python -m tests.fuzz.guided` follows code coverage instead.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
import traceback
from pathlib import Path

from tests.fuzz.datagrams import DatagramSubject
from tests.fuzz.links import LinkSubject
from tests.fuzz.mutate import Mutator
from tests.fuzz.sections import SectionSubject
from tests.fuzz.subjects import Subject

MIB = 1024 * 1024
# A member table filled by strangers' names holds 16,384 rows of about 2 KiB; the rest is what the allocator keeps.
GROWTH_MIB_MAX = 96
WARM_UP_SHARE = 0.02  # of the inputs, before memory is first read: caches, the interpreter's own
PROGRESS_INPUTS = 20_000

SUBJECTS: dict[str, type[Subject]] = {s.name: s for s in (DatagramSubject, LinkSubject, SectionSubject)}
SHARES = {"section": 0.15, "link": 0.25, "datagram": 0.6}  # of all inputs, by what each decoder is exposed to


def resident_mib() -> float:
    """Physical memory of this process (proc(5), statm)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def run(subject: Subject, inputs: int, seed: int) -> bool:
    """Feed that many inputs. False, and the fault printed, at the first that fails."""
    mutator = Mutator(subject.seeds(), random.Random(f"{subject.name} {seed}"))
    began = time.monotonic()
    resident_before = 0.0
    for index in range(inputs):
        if index == int(inputs * WARM_UP_SHARE):
            resident_before = resident_mib()
        if index and index % PROGRESS_INPUTS == 0:
            told = f"{index:,} inputs of {subject.name}, {time.monotonic() - began:.0f} s, {resident_mib():.0f} MiB"
            print(told, file=sys.stderr, flush=True)
        data = mutator.draw()
        try:
            subject.feed(data)
        except Exception:
            traceback.print_exc()
            print(f"input {index} of {subject.name}, seed {seed}; again: ", file=sys.stderr)
            print(f"python -m tests.fuzz --subject {subject.name} --hex {data.hex()}", file=sys.stderr)
            return False
    growth_mib = resident_mib() - resident_before
    row = {
        "subject": subject.name,
        "inputs": inputs,
        "seed": seed,
        "duration_s": round(time.monotonic() - began, 1),
        "growth_mib": round(growth_mib, 1),
        "outcomes": dict(sorted(subject.outcomes.items())),
    }
    if isinstance(subject, DatagramSubject):
        flooded = subject.flooded.statistics()
        row["flooded_node"] = {
            "members": flooded.members,
            "rumours_waiting": flooded.rumours_waiting,
            "suspicions_watched": flooded.suspicions_watched,
        }
    print(json.dumps(row), flush=True)
    if growth_mib > GROWTH_MIB_MAX:
        print(f"memory grew by {growth_mib:.0f} MiB, more than {GROWTH_MIB_MAX}", file=sys.stderr)
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the decoders")
    parser.add_argument("--inputs", type=int, default=1_000_000, help="over all subjects")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--subject", choices=sorted(SUBJECTS), help="only this one, with all inputs")
    parser.add_argument("--hex", help="one input to take instead")
    options = parser.parse_args()
    if options.hex is not None:
        SUBJECTS[options.subject]().feed(bytes.fromhex(options.hex))
        return 0
    shares = {options.subject: 1.0} if options.subject else SHARES
    results = [run(SUBJECTS[name](), int(options.inputs * share), options.seed) for name, share in shares.items()]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
