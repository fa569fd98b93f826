"""All scenarios by the name the command line knows them by.

The one of key rotation belongs here too, beside `upgrade`, once a keyring can be changed while a core runs."""

from __future__ import annotations

from collections.abc import Callable

from tests.simulation.scenarios import cuts, faults, membership, protocol, state
from tests.simulation.scenarios.settled import Figures
from tests.simulation.world import World

SCENARIOS: dict[str, Callable[[World, int], Figures]] = {
    "join": membership.join,
    "kill": membership.kill,
    "restart": membership.restart,
    "lost-data": membership.lost_data,
    "restart-all": membership.restart_all,
    "leave": membership.leave,
    "duplicate-id": membership.duplicate_id,
    "partition": cuts.partition,
    "halves": cuts.halves,
    "one-way-cut": cuts.one_way_cut,
    "asymmetric-cut": cuts.asymmetric_cut,
    "cut-pair": cuts.cut_pair,
    "loss": faults.loss,
    "endure": faults.endure,
    "stall": faults.stall,
    "stalls": faults.stalls,
    "clock-skew": faults.clock_skew,
    "drain": state.drain,
    "fresh": state.fresh,
    "busy": state.busy,
    "wide": state.wide,
    "load-change": state.load_change,
    "busy-load-change": state.busy_load_change,
    "mixed-versions": protocol.mixed_versions,
    "upgrade": protocol.upgrade,
}
