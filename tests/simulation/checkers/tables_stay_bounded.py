"""No table of a core outgrows the bound named for it, so memory does not grow with what peers send."""

from __future__ import annotations

from tests.simulation import inside
from tests.simulation.checkers.checker import Checker
from tests.simulation.sim_node import SimNode
from tests.simulation.world import World


class TablesStayBounded(Checker):
    def on_sample(self, world: World, node: SimNode) -> None:
        for table in inside.table_sizes(node.core):
            assert table.size <= table.maximum, f"{node.name} holds {table.size} {table.name} of {table.maximum}"
