"""What all nodes of a world believe at one instant."""

from __future__ import annotations

from mesh.view import MemberStatus, NodeStatus, Readiness
from tests.simulation import inside
from tests.simulation.world import World

GONE = (MemberStatus.DEAD, MemberStatus.LEFT)


def all_healthy(world: World) -> bool:
    """Every running node sees every running node healthy, its profile included.

    Where datagrams are lost a node may rightly doubt itself, so then it is not asked about itself."""
    return all_know_all(world) and all(_sees_all_healthy(world, n.name) for n in world.running)


def all_know_all(world: World) -> bool:
    """Every running node takes every other for alive, in its present life and with its present profile."""
    own = [inside.own_row(n.core) for n in world.running]
    for observer in world.running:
        rows = inside.table(observer.core).members
        for member in own:
            row = rows.get(member.node_id)
            if row is None or row.status is not MemberStatus.ALIVE or row.generation != member.generation:
                return False
            if row.warm != member.warm:
                return False
    return True


def _sees_all_healthy(world: World, observer: str) -> bool:
    view = world.view(observer)
    for node in world.running:
        member = view.members[node.core.node_id]
        if member.is_self and world.network.loss:
            continue
        if view.status(member) is not NodeStatus.HEALTHY:
            return False
    return True


def all_see_gone(world: World, name: str) -> bool:
    return all(world.status(n.name, name) in GONE for n in world.running)


def knowing_share(world: World, name: str, load_version: int) -> float:
    """The share of the others that hold a load of the member published at that version or later."""
    rows = [inside.row(n.core, name) for n in world.running if n.name != name]
    return sum(row is not None and row.load_version >= load_version for row in rows) / len(rows)


def all_know_readiness(world: World, name: str, readiness: Readiness) -> bool:
    rows = [inside.row(n.core, name) for n in world.running]
    return all(row is not None and row.load.readiness is readiness for row in rows)
