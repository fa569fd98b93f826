"""How the times of a mesh grow with the number of its members, so that packets do not.

A node receives some 270 records a second and not more. With every member publishing each second that is enough for a
few hundred; beyond, each publishes less often, and what is late or stale is judged by the longer interval."""

from __future__ import annotations

import math

from mesh.gossip_types import GossipConfig
from mesh.membership import MemberTable


class Pace:
    """The configured times as they are for the members there are now."""

    def __init__(self, config: GossipConfig, table: MemberTable) -> None:
        self._config = config
        self._table = table

    @property
    def slowness(self) -> float:
        """1.0 up to steady_members, then the root of how many times as many they are: 2 at four times as many."""
        return max(1.0, math.sqrt((len(self._table.live) + 1) / self._config.steady_members))

    @property
    def publish_interval_s(self) -> float:
        return self._config.publish_interval_s * self.slowness

    @property
    def overdue_s(self) -> float:
        return self._config.overdue_s * self.slowness

    @property
    def evidence_age_s(self) -> float:
        return self._config.evidence_age_s * self.slowness
