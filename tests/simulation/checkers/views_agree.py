"""When nothing was done to the mesh for 15 s (no cut, stall, start or death), all running nodes agree on who is there.

After a heal, a restart or a kill this is the bound within which all views are equal again."""

from __future__ import annotations

from mesh.view import MemberStatus
from tests.simulation import inside
from tests.simulation.checkers.checker import Checker
from tests.simulation.sim_node import SimNode
from tests.simulation.world import World

AGREE_S = 15.0
LOSS_MAX = 0.1  # beyond it somebody is under suspicion at any time
GONE = (MemberStatus.DEAD, MemberStatus.LEFT)


class ViewsAgreeWhenNothingHappens(Checker):
    def on_sample(self, world: World, node: SimNode) -> None:
        quiet_s = world.now - world.disturbed_at
        if quiet_s < AGREE_S or world.network.cuts or world.network.loss > LOSS_MAX or world.is_duplicate_meant:
            return
        rows = inside.table(node.core).members
        running = {other.core.node_id: other for other in world.running}
        for name, other in running.items():
            if world.now - other.started_at < AGREE_S:
                continue
            row = rows.get(name)
            assert row is not None, f"{node.name} does not know {name} after {quiet_s:.1f} quiet seconds"
            own = inside.own_row(other.core)
            assert row.generation == own.generation, f"{node.name} knows a former life of {name}: {row.generation}"
            assert row.status not in GONE, f"{node.name} takes {name} for {row.status.name} after {quiet_s:.1f} s"
            assert row.profile == own.profile, f"{node.name} has an old profile of {name} after {quiet_s:.1f} s"
        for name, row in rows.items():
            if name not in running:
                assert row.status in GONE, f"{node.name} takes {name} for {row.status.name}, which does not run"
