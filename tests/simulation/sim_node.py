"""A process of the simulated mesh, or the place of one that was killed. It has a clock of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from mesh.gossip import Gossip
from mesh.view import Address

Dialect = Callable[[bytes], bytes]  # what another version of the protocol makes of a payload before it is sealed


@dataclass(slots=True, eq=False)
class SimNode:
    """clock_rate: seconds of its clock in a second of the world. clock_offset_s: what it showed when that began."""

    name: str
    address: Address
    clock_rate: float = 1.0
    clock_offset_s: float = 0.0
    gossip: Gossip | None = None
    generation: int = 0
    started_at: float = 0.0
    stalled_until: float = 0.0
    wake_at: float = float("inf")
    seeds: tuple[Address, ...] = ()
    dialect: Dialect | None = None
    inbox: list[tuple[bytes, Address]] = field(default_factory=list)

    @property
    def core(self) -> Gossip:
        assert self.gossip is not None, f"{self.name} does not run"
        return self.gossip

    def clock(self, now: float) -> float:
        """What its clock shows at that time of the world."""
        return self.clock_offset_s + now * self.clock_rate

    def time_of(self, clock: float) -> float:
        """When its clock shows that, in the world's time."""
        return (clock - self.clock_offset_s) / self.clock_rate
