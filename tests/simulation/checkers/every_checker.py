"""All invariants, for a world that runs a scenario."""

from __future__ import annotations

from tests.simulation.checkers.checker import Checker
from tests.simulation.checkers.datagrams_fit import DatagramsFit
from tests.simulation.checkers.nobody_returns import NobodyReturnsWithoutANewerVersion
from tests.simulation.checkers.only_the_owner_raises import OnlyTheOwnerRaisesItsVersion
from tests.simulation.checkers.packet_budget import PacketsStayWithinTheBudget
from tests.simulation.checkers.queues_stay_bounded import QueuesStayBounded
from tests.simulation.checkers.replays_change_nothing import ReplaysChangeNothing
from tests.simulation.checkers.tables_stay_bounded import TablesStayBounded
from tests.simulation.checkers.versions_never_fall import VersionsNeverFall
from tests.simulation.checkers.views_agree import ViewsAgreeWhenNothingHappens

REPLAYED_NODES = 20  # in larger worlds to compare all a node knows for each replay takes most of the time


def every_checker(seed: int, node_count: int) -> list[Checker]:
    checkers: list[Checker] = [
        VersionsNeverFall(),
        OnlyTheOwnerRaisesItsVersion(),
        NobodyReturnsWithoutANewerVersion(),
        DatagramsFit(),
        PacketsStayWithinTheBudget(),
        QueuesStayBounded(),
        TablesStayBounded(),
        ViewsAgreeWhenNothingHappens(),
    ]
    if node_count <= REPLAYED_NODES:
        checkers.append(ReplaysChangeNothing(seed))
    return checkers
