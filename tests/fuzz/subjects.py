"""What is fuzzed, under one interface, so that our own mutator and a coverage-guided one drive the same checks."""

from __future__ import annotations

from collections import Counter
from typing import Protocol


class Subject(Protocol):
    """One decoder with its checks. outcomes: how often each kind of acceptance and each reason of rejection came up."""

    name: str
    outcomes: Counter[str]

    def seeds(self) -> list[bytes]:
        """Inputs that are accepted, from which mutations start."""
        ...

    def feed(self, data: bytes) -> None:
        """Take one input, whatever its bytes. Raises AssertionError, or what the decoder let out, for a fault."""
        ...
