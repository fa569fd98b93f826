"""Ways to choose a node: the project's own router, and those it is compared with."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mesh.errors import NoCapacity
from mesh.router import OwnDispatch, Router, RouteRequest
from tests.simulation.routing.traces import Request

if TYPE_CHECKING:
    from tests.simulation.routing.world import World

RETRY_AFTER_S = 1.0  # of those that cannot tell


@dataclass(frozen=True, slots=True)
class Refused:
    retry_after_s: float


class Policy(Protocol):
    """failed: names of the nodes that turned this request away already."""

    def choose(self, request: Request, failed: frozenset[str]) -> int | Refused: ...

    def refuse(self, request: Request, failed: frozenset[str]) -> float: ...

    def opened(self, request: Request, node: int) -> None: ...

    def finished(self, request: Request) -> None: ...


class OwnRouter:
    """mesh.router as it is, on the entry's own view. is_affine: whether it is told of blocks."""

    def __init__(self, world: World, entry: int, *, is_affine: bool = True) -> None:
        self._world = world
        self._hearsay = world.listen()
        self._entry = entry
        self._is_affine = is_affine
        self._router = Router(random.Random(f"{world.setting.seed}|router|{entry}"))
        self._open: dict[Request, OwnDispatch] = {}

    def choose(self, request: Request, failed: frozenset[str]) -> int | Refused:
        view = self._hearsay.view(self._entry, self._world.now)
        blocks = request.blocks if self._is_affine else ()
        route = RouteRequest(
            "demo", request.prompt_bytes, failed, blocks, was_refused=bool(failed), identity=hash(request)
        )
        try:
            node_id = self._router.rank(view, route, view.now)[0]
        except NoCapacity as exc:
            return Refused(exc.retry_after_s)
        member = view.members[node_id]
        self._open[request] = self._router.dispatched(
            node_id, "demo", request.prompt_bytes, member.load_version, blocks=blocks, generation=member.generation
        )
        return self._world.names.index(node_id)

    def refuse(self, request: Request, failed: frozenset[str]) -> float:
        blocks = request.blocks if self._is_affine else ()
        route = RouteRequest(
            "demo", request.prompt_bytes, failed, blocks, was_refused=bool(failed), identity=hash(request)
        )
        view = self._hearsay.view(self._entry, self._world.now)
        return self._router.refused(view, route, view.now).retry_after_s

    def opened(self, request: Request, node: int) -> None:
        if node == self._entry:
            self._router.opened(self._open[request])

    def finished(self, request: Request) -> None:
        self._router.finished(self._open.pop(request))


class Simple:
    """A choice that keeps nothing of a request."""

    def __init__(self, world: World, entry: int) -> None:
        self.world = world
        self.rng = random.Random(f"{world.setting.seed}|simple|{entry}")
        self.turn = self.rng.randrange(world.setting.nodes)

    def choose(self, request: Request, failed: frozenset[str]) -> int | Refused:
        return self.pick([node for node, name in enumerate(self.world.names) if name not in failed])

    def pick(self, nodes: list[int]) -> int:
        raise NotImplementedError

    def outstanding(self, node: int) -> int:
        """As of now, whoever asks."""
        return self.world.engines[node].outstanding

    def refuse(self, request: Request, failed: frozenset[str]) -> float:
        return RETRY_AFTER_S

    def opened(self, request: Request, node: int) -> None:
        pass

    def finished(self, request: Request) -> None:
        pass


class Anyone(Simple):
    def pick(self, nodes: list[int]) -> int:
        return self.rng.choice(nodes)


class RoundRobin(Simple):
    def pick(self, nodes: list[int]) -> int:
        self.turn += 1
        return nodes[self.turn % len(nodes)]


class LeastOutstanding(Simple):
    """With the true number of requests on every node, at no cost and at once: what no mesh has."""

    def pick(self, nodes: list[int]) -> int:
        return min(nodes, key=lambda node: (self.outstanding(node), self.rng.random()))


class TwoChoices(Simple):
    """The less occupied of two random nodes, by their true numbers: as if it asked both first, at no cost."""

    def pick(self, nodes: list[int]) -> int:
        return min(self.rng.sample(nodes, min(2, len(nodes))), key=self.outstanding)


POLICIES: dict[str, Callable[[World, int], Policy]] = {
    "router": OwnRouter,
    "random": Anyone,
    "round robin": RoundRobin,
    "least outstanding": LeastOutstanding,
    "two choices": TwoChoices,
}
