"""Fuzzing that follows code coverage (atheris, libFuzzer): the subjects and seeds of tests.fuzz.

    python -m tests.fuzz.guided datagram|link|section [CORPUS_FOLDER] [-runs=N] [any option of libFuzzer]

Needs an environment with atheris, msgpack and cryptography alone; `make fuzz` makes one.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mesh"]):
    from tests.fuzz.datagrams import DatagramSubject
    from tests.fuzz.links import LinkSubject
    from tests.fuzz.sections import SectionSubject

from tests.fuzz.mutate import Mutator
from tests.fuzz.subjects import Subject

SUBJECTS: dict[str, type[Subject]] = {s.name: s for s in (DatagramSubject, LinkSubject, SectionSubject)}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in SUBJECTS:
        sys.exit(f"usage: python -m tests.fuzz.guided {'|'.join(SUBJECTS)} [CORPUS_FOLDER] [-runs=N ...]")
    subject = SUBJECTS[sys.argv[1]]()
    mutator = Mutator(subject.seeds(), random.Random(0))

    def mutate(data: bytes, size_max: int, seed: int) -> bytes:
        """Half of the time our own mutations, which keep msgpack whole; else libFuzzer's."""
        if seed % 2:
            return mutator.mutated(data)[:size_max]
        return bytes(atheris.Mutate(data, size_max))

    with tempfile.TemporaryDirectory(prefix="fuzz-seeds-") as folder:
        for index, seed in enumerate(subject.seeds()):
            Path(folder, f"seed-{index}").write_bytes(seed)
        options = [sys.argv[0], *sys.argv[2:], folder]
        atheris.Setup(options, subject.feed, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
