"""`python -m tests.cluster.limits`: keys and limits over four real nodes. One JSON line of figures.

A key is hammered at ten times its limit through all nodes, in a network namespace each, so that the mesh can be cut in
two. Answers are of one token of a tiny random model: the gate is measured, not an engine. An answer counts at the time
it came. Exit status 1 where one of these does not hold:

  requests_most, requests_mean  admitted per sliding minute at most, and per minute over the whole time: within 3 %
  tokens_most, tokens_mean      of tokens: within 5 %
  partition_most                during two against two and after it: at most 1.1 of the limit
  create_s, revoke_s            a key made at one node works at the others, one revoked at none: within 2 s
  heal_s                        revoked in a partition: refused everywhere 2 s after the sides see each other
  orders_s                      revoked while two were away, then all restarted, in every order: as heal_s
  faults                        nothing but answers and refusals

Without root or `ip` all nodes are on 127.0.0.1 and what needs a partition is skipped; the figures say so.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nodes.model_tools.random_llama import write_random_llama
from tests.benchmark.gossip.namespaces import NamespacesUnavailable, Network, network
from tests.cluster.figures import finish, law, progress, quantiles
from tests.cluster.hammer import Order, Outcome, hammer
from tests.cluster.mesh import NodeProcess, wait_for

NODES = 4
SIDES = ((0, 1), (2, 3))
WINDOW_S = 60.0
MODEL = "tiny"
CLUSTER_KEY = "A" * 43 + "="  # 32 zero bytes: these namespaces hold no secrets
AGREE_S = 60.0
POLL_S = 0.02
PARTS = ("effects", "requests", "tokens", "partition", "heal", "orders")
# Before a load begins, so that its process runs.
LEAD_S = 2.0
FAULTS = {0: "connection failed", -1: "no answer in time"}
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}


@dataclass(frozen=True, slots=True)
class Options:
    """limit: requests per minute. seconds: each load takes. effect_s: until an edit holds everywhere. orders: of
    restarts, at most."""

    limit: int = 600
    factor: float = 10.0
    seconds: float = 120.0
    partition_s: float = 75.0
    after_s: float = 30.0
    effect_s: float = 2.0
    orders: int = 24
    seed: int = 7
    only: str = ""


class _Limits:
    def __init__(self, nodes: Sequence[NodeProcess], net: Network | None, options: Options) -> None:
        self._nodes = nodes
        self._net = net
        self._options = options
        self._rng = random.Random(options.seed)
        self._names = itertools.count()
        self._faults: Counter[str] = Counter()
        self._laws: dict[str, Any] = {}
        self._figures: dict[str, Any] = {"skipped": []}

    def run(self) -> dict[str, Any]:
        net = self._net
        parts: dict[str, Callable[[], None]] = {
            "effects": self._effects,
            "requests": self._requests,
            "tokens": self._tokens,
            "orders": self._orders_of_restarts,
        }
        if net is not None:
            parts |= {"partition": lambda: self._partition(net), "heal": lambda: self._revoke_in_a_partition(net)}
        for name in self._options.only.split(",") if self._options.only else PARTS:
            if name in parts:
                parts[name]()
            else:
                self._figures["skipped"].append(name)
        self._laws["faults"] = law(sum(self._faults.values()), at_most=0)
        self._figures |= {"seed": self._options.seed, "limit": self._options.limit, "seconds": self._options.seconds}
        return self._figures | {"faults": dict(self._faults), "laws": self._laws}

    # Loads.

    def _requests(self) -> None:
        options = self._options
        token = self._create(requests_per_minute=options.limit)
        admitted = self._load(token, options.limit / 60 * options.factor, options.seconds)
        self._judge("requests", admitted, options.limit, 0.03)

    def _tokens(self) -> None:
        options = self._options
        cost = self._cost()
        limit = options.limit * cost
        token = self._create(tokens_per_minute=limit)
        admitted = self._load(token, options.limit / 60 * options.factor, options.seconds)
        self._figures["tokens_limit"] = limit
        self._judge("tokens", [(at, tokens) for at, tokens in admitted], limit, 0.05)

    def _judge(self, kind: str, admitted: list[tuple[float, int]], limit: int, tolerance: float) -> None:
        weights = [(at, 1 if kind == "requests" else tokens) for at, tokens in admitted]
        most = most_in_a_window(weights)
        # The first minute is full at once, and each later one as soon as what is in it expires.
        minutes = max(1, round(self._options.seconds / WINDOW_S))
        ends = weights[0][0] + self._options.seconds if weights else 0.0  # an answer may come after the load has ended
        mean = sum(weight for at, weight in weights if at <= ends) / minutes
        self._figures[kind] = {"limit": limit, "most": most, "mean": mean, "least": least_in_a_window(weights)}
        self._laws[f"{kind}_most"] = law(most / limit, at_most=1 + tolerance)
        self._laws[f"{kind}_mean_most"] = law(mean / limit, at_most=1 + tolerance)
        self._laws[f"{kind}_mean_least"] = law(mean / limit, at_least=1 - tolerance)

    def _load(self, token: str, rate: float, seconds: float, during: Callable[[], None] = lambda: None) -> list[Any]:
        """[(answered at, tokens)] of what was admitted."""
        progress(f"{rate:g} requests/s for {seconds:g} s")
        order = Order(
            [node.http for node in self._nodes],
            token,
            BODY,
            rate,
            seconds,
            time.monotonic() + LEAD_S,
            self._rng.randrange(2**31),
        )
        load = hammer(order)
        try:
            during()
            outcomes = load.outcomes()
        finally:
            load.close()
        return self._admitted(outcomes)

    def _admitted(self, outcomes: list[Outcome]) -> list[tuple[float, int]]:
        waits = self._figures.setdefault("answer_ms", [])
        waits.append(quantiles([outcome.seconds for outcome in outcomes if outcome.status == 200], 1e3))
        for outcome in outcomes:
            if outcome.status not in (200, 429):
                self._faults[FAULTS.get(outcome.status, f"status {outcome.status}")] += 1
        return [(outcome.at, outcome.tokens) for outcome in outcomes if outcome.status == 200]

    def _cost(self) -> int:
        """Tokens of one request."""
        status, answer = self._chat(self._nodes[0], self._create())
        assert status == 200, answer
        return int(answer["usage"]["total_tokens"])

    def _partition(self, net: Network) -> None:
        """The worst time: cut where nobody has used anything, and has noticed nothing, as the load begins."""
        options = self._options
        token = self._create(requests_per_minute=options.limit)
        time.sleep(1.0)  # the key's use is told by nobody yet

        def cut_and_heal() -> None:
            time.sleep(max(0.0, LEAD_S - 0.5))
            net.divide(*SIDES)
            time.sleep(options.partition_s + 0.5)
            net.divide()

        rate = options.limit / 60 * options.factor
        admitted = self._load(token, rate, options.partition_s + options.after_s, cut_and_heal)
        most = most_in_a_window([(at, 1) for at, _ in admitted])
        self._figures["partition"] = {"limit": options.limit, "most": most, "admitted": len(admitted)}
        self._laws["partition_most"] = law(most / options.limit, at_most=1.1)
        self.wait_until_agreed()

    # Effects of edits.

    def _effects(self) -> None:
        seconds: dict[str, list[float]] = {"create_s": [], "revoke_s": []}
        for node in self._nodes:
            started = time.monotonic()
            token = self._create(node)
            seconds["create_s"].append(self._until(200, token, started))
            started = time.monotonic()
            self._revoke(node, token)
            seconds["revoke_s"].append(self._until(401, token, started))
        for name, values in seconds.items():
            self._figures[name] = [round(value, 3) for value in values]
            self._laws[name] = law(max(values), at_most=self._options.effect_s)

    def _revoke_in_a_partition(self, net: Network) -> None:
        token = self._create()
        self._until(200, token, time.monotonic())
        net.divide(*SIDES)
        one, other = self._nodes[SIDES[0][0]], self._nodes[SIDES[1][0]]
        wait_for(lambda: "offline" in one.statuses().values(), "the cut is noticed", AGREE_S)
        self._revoke(one, token)
        assert self._chat(one, token)[0] == 401
        self._figures["accepted_beyond_the_cut"] = self._chat(other, token)[0] == 200
        healed = time.monotonic()
        net.divide()
        self._figures["seen_again_s"] = round(self._wait_until_seen(), 3)
        seen = time.monotonic()
        self._until(401, token, seen)
        self._figures["refused_after_heal_s"] = round(time.monotonic() - healed, 3)
        self._laws["heal_s"] = law(time.monotonic() - seen, at_most=self._options.effect_s)
        self.wait_until_agreed()

    def _orders_of_restarts(self) -> None:
        orders = list(itertools.permutations(range(len(self._nodes))))
        self._rng.shuffle(orders)
        took = []
        for order in orders[: self._options.orders]:
            progress(f"restart in the order {order}")
            token = self._create()
            self._until(200, token, time.monotonic())
            for index in SIDES[1]:
                self._nodes[index].kill()
            self._revoke(self._nodes[SIDES[0][0]], token)
            for index in SIDES[0]:
                self._nodes[index].kill()
            meshes = [node.mesh for node in self._nodes]
            for index in order:
                self._nodes[index].start(*(mesh for i, mesh in enumerate(meshes) if i != index), wait_until_ready=False)
            self.wait_until_agreed()
            took.append(self._until(401, token, time.monotonic()))
            assert {self._chat(node, token)[0] for node in self._nodes} == {401}
        self._figures["orders"] = len(took)
        self._laws["orders_s"] = law(max(took, default=None), at_most=self._options.effect_s)

    def _wait_until_seen(self) -> float:
        """Until each node has some of the other side again, as its members."""

        def sees(node: NodeProcess) -> bool:
            return "offline" not in node.statuses().values()

        return wait_for(lambda: all(sees(node) for node in self._nodes), "the sides see each other", AGREE_S)

    def wait_until_agreed(self) -> None:
        expected = {node.name: "healthy" for node in self._nodes}

        def agreed() -> bool:
            return all(node.is_ready() and node.statuses() == expected for node in self._nodes)

        wait_for(agreed, "all see all healthy", AGREE_S)

    def _until(self, status: int, token: str, started: float) -> float:
        """Seconds since `started` until every node answers with it."""
        waiting = list(self._nodes)
        while waiting:
            if self._chat(waiting[0], token)[0] == status:
                waiting.pop(0)
                continue
            assert time.monotonic() - started < AGREE_S, f"{waiting[0].name} does not answer {status}"
            time.sleep(POLL_S)
        return time.monotonic() - started

    # Requests.

    def _create(self, node: NodeProcess | None = None, **limits: int) -> str:
        body = {"name": f"key-{next(self._names)}", **limits}
        status, answer = ask(node or self._nodes[0], "/admin/keys", body, admin_token(node or self._nodes[0]))
        assert status == 200, answer
        return str(answer["token"])

    def _revoke(self, node: NodeProcess, token: str) -> None:
        public_id = token.split("-")[1]
        status, answer = ask(node, f"/admin/keys/{public_id}", None, admin_token(node), "DELETE")
        assert status == 200, answer

    def _chat(self, node: NodeProcess, token: str) -> tuple[int, Any]:
        return ask(node, "/v1/chat/completions", BODY, token)


def ask(node: NodeProcess, path: str, body: Any, token: str, method: str = "POST") -> tuple[int, Any]:
    """(status, answer)."""
    headers = {"content-type": "application/json", "authorization": f"Bearer {token}"}
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(node.url + path, content, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def admin_token(node: NodeProcess) -> str:
    return (node.folder / "data" / "admin-token").read_text().strip()


def most_in_a_window(weights: Sequence[tuple[float, int]]) -> int:
    """Of (when, how much) in order of times, in the fullest WINDOW_S."""
    most = inside = first = 0
    for at, weight in weights:
        inside += weight
        while weights[first][0] <= at - WINDOW_S:
            inside -= weights[first][1]
            first += 1
        most = max(most, inside)
    return most


def least_in_a_window(weights: Sequence[tuple[float, int]]) -> int | None:
    """In the emptiest WINDOW_S between the first and the last; None where they are closer."""
    ends = [at for at, _ in weights if at - weights[0][0] >= WINDOW_S] if weights else []
    return min((sum(w for at, w in weights if end - WINDOW_S < at <= end) for end in ends), default=None)


@dataclass
class _Place:
    """Where nodes run."""

    net: Network | None
    nodes: list[NodeProcess] = field(default_factory=list)


@contextmanager
def _place(folder: Path, network_of: Network | None) -> Iterator[_Place]:
    model = write_random_llama(folder / "model")
    place = _Place(network_of)
    try:
        for index in range(NODES):
            inside = {}
            if network_of is not None:
                inside = {"host": network_of.host(index), "prefix": network_of.inside(index, [])}
            node = NodeProcess(
                folder,
                f"node-{index + 1}",
                "--model",
                f"{model}={MODEL}",
                "--slots",
                "16",
                environment={"AI_CLUSTER_KEY": CLUSTER_KEY},
                **inside,  # type: ignore[arg-type]
            )
            place.nodes.append(node)
            node.start(*(other.mesh for other in place.nodes[:-1]), wait_until_ready=False)
        yield place
    finally:
        for node in place.nodes:
            node.close()


def run(folder: Path, options: Options, net: Network | None = None) -> dict[str, Any]:
    with _place(folder, net) as place:
        measured = _Limits(place.nodes, net, options)
        measured.wait_until_agreed()
        return measured.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Options()
    parser.add_argument("--limit", type=int, default=defaults.limit, help="requests per minute")
    parser.add_argument("--factor", type=float, default=defaults.factor, help="offered, of the limit")
    parser.add_argument("--seconds", type=float, default=defaults.seconds, help="of each load")
    parser.add_argument("--partition-s", type=float, default=defaults.partition_s)
    parser.add_argument("--after-s", type=float, default=defaults.after_s, help="load after the partition")
    parser.add_argument("--effect-s", type=float, default=defaults.effect_s, help="what edits may take to hold")
    parser.add_argument("--orders", type=int, default=defaults.orders, help="of restarts")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--only", default=defaults.only, help=f"some of {','.join(PARTS)}")
    options = Options(**vars(parser.parse_args()))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        net = None
        try:
            net = stack.enter_context(network(NODES, {}))
        except (NamespacesUnavailable, OSError) as exc:  # root may lack the right to make them, as in containers
            progress(f"no partitions: {exc}")
        figures = run(Path(folder), options, net)
    finish(figures)


if __name__ == "__main__":
    main()
