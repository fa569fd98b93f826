"""How the times of a mesh grow with the number of its members, so that packets do not.

A node receives some 270 records a second and not more. With every member publishing each second that is enough for a
few hundred; beyond, each publishes less often, and what is late or stale is judged by the longer interval."""

from __future__ import annotations

import math

from mesh.gossip_types import GossipConfig
from mesh.membership import MemberTable

# Each member is told directly, so this is what such publications may take of the budget of packets: half.
USAGE_INTERVAL_A_MEMBER_S = 0.05


class Pace:
    """The configured times as they are for the members there are now."""

    def __init__(self, config: GossipConfig, table: MemberTable) -> None:
        self._config = config
        self._table = table

    @property
    def slowness(self) -> float:
        """1.0 up to steady_members, then how many times as many there are."""
        return max(1.0, (len(self._table.live) + 1) / self._config.steady_members)

    @property
    def publish_interval_s(self) -> float:
        """Between two publications of a load that did not change: what is older than a few of these is stale."""
        return self._config.publish_interval_s * self.slowness

    @property
    def change_interval_s(self) -> float:
        """Between two publications of a load that did. It grows with the root: changes are told before all others, so
        they arrive even where there are more of them than one node is sent."""
        return self._config.publish_interval_s * math.sqrt(self.slowness)

    @property
    def usage_interval_s(self) -> float:
        """Between two publications made because a key's usage must be known soon."""
        return min(self.change_interval_s, USAGE_INTERVAL_A_MEMBER_S * (len(self._table.live) + 1))

    @property
    def overdue_s(self) -> float:
        return self._config.overdue_s * self.slowness

    @property
    def evidence_age_s(self) -> float:
        """It grows with the fourth root only: a dead member must be found in time, and what is a false suspicion for
        it is refuted by any newer version."""
        return self._config.evidence_age_s * math.sqrt(math.sqrt(self.slowness))
