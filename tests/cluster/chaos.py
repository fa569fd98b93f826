"""`python -m tests.cluster.chaos --streams 500 --kill`: does a client notice when nodes die? One JSON line of figures.

Real nodes with the built-in fp32 model, all of them entries. Every few seconds one is killed (SIGKILL) or stopped
(SIGSTOP, then SIGCONT or SIGKILL) and restarted, while at least two run. The right answers come from an undisturbed run
of the same requests on one node before. Exit status 1 where one of these does not hold:

  errors        of the streams whose entry was left alone: none with an error, or a lost, doubled or changed token
  prefixes      what other streams had shown before they broke is a beginning of the right text; their clients repeat
                them at another node, and get it all
  pause_kill_s  99 of 100 pauses of streams that lost their serving node to a kill: 0.5 s beyond the prefill
  pause_stop_s  the same at a stop: 3 s
  free_s        after the last stream every node reports nothing active and all slots free within 2 s

A pause is the gap between two texts in which the serving node failed, from the harm on, less the median gap of the
stream and what an idle engine takes to prefill the answer so far: a stream that waited for a slot when its node was
harmed did so before. Which node failed when is taken from what the entries logged. Where
several were harmed in one pause, the one that went on included ("several"), it has no bound. The longest of each
kind are told on stderr.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import trio

from nodes import garbage
from tests.cluster.disturber import Disturber, Harm
from tests.cluster.figures import finish, free_after_s, law, progress, quantile, quantiles
from tests.cluster.mesh import Mesh, NodeProcess
from tests.cluster.stream_client import Answer, ask
from tests.cluster.workload import ENDLESS, Case, Workload, difference, prefix_difference, prepare

PAUSE_KILL_MAX_S = 0.5
PAUSE_STOP_MAX_S = 3.0
FREE_MAX_S = 2.0
FREE_TIMEOUT_S = 20.0
# Clients of a broken entry try again; one that fails so often has found a fault.
ATTEMPTS_MAX = 12
# With logged times and times of this process compared; they are of one clock.
CLOCK_SLACK_S = 0.05
PROGRESS_INTERVAL_S = 5.0
PAUSES_TOLD = 3  # of each kind
# This process is on the nodes' cores: how late it reads belongs to a story of a long pause.
OWN_TICK_S = 0.02
OWN_LATE_MIN_S = 0.1
LOSS_MESSAGE = "a node did not serve a request"
RESUMPTION_MESSAGE = "an answer goes on at another node"
PAUSE_KINDS = ("kill", "stop", "several", "unexplained")


@dataclass(frozen=True, slots=True)
class Options:
    """tokens: least and most of an answer. harms_max: bounds how often a node is harmed. edge: one more node, without a
    model and never harmed, is an entry too."""

    streams: int = 500
    nodes: int = 4
    concurrency: int = 12
    seed: int = 7
    tokens: tuple[int, int] = (300, 900)
    kill: bool = True
    harms_max: int | None = None
    edge: bool = False


@dataclass(slots=True)
class Attempt:
    """One client's one try."""

    case: Case
    request_id: str
    entry: str
    answer: Answer
    harms: list[Harm] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Pause:
    """seconds: beyond the median gap and the prefill. begun_at, ended_at: when the texts around it came. causes: what
    had been done to the nodes that failed in it; None where nothing had. onto: who went on, and what was done to it
    meanwhile. client_late_s: the longest that this process itself stood still meanwhile, 0 below OWN_LATE_MIN_S."""

    request_id: str
    seconds: float
    begun_at: float
    ended_at: float
    losses: list[_Loss]
    causes: list[Harm | None]
    onto: _Resumption | None
    onto_harms: list[Harm]
    client_late_s: float

    @property
    def kind(self) -> str:
        """Of its one cause, or why it is neither."""
        if None in self.causes:
            return "unexplained"
        return "several" if len(self.causes) > 1 or self.onto_harms else next(harm.kind for harm in self.causes if harm)

    def story(self) -> dict[str, Any]:
        """For whoever wants to know why it was so long; times in seconds since the last text before it."""
        onto = self.onto
        return {
            "request_id": self.request_id,
            "seconds": round(self.seconds, 3),
            "kind": self.kind,
            "client_late_s": round(self.client_late_s, 3),
            "text_again_at": round(self.ended_at - self.begun_at, 3),
            "onto": onto and {"node": onto.peer, "at": round(onto.at - self.begun_at, 3)},
            "onto_harmed": [
                {
                    "kind": harm.kind,
                    "at": round(harm.begun_at - self.begun_at, 3),
                    "over_at": harm.over_at and round(harm.over_at - self.begun_at, 3),
                }
                for harm in self.onto_harms
            ],
            "failed": [
                {
                    "node": loss.peer,
                    "at": round(loss.at - self.begun_at, 3),
                    "error": loss.error,
                    "harmed_at": harm and round(harm.begun_at - self.begun_at, 3),
                }
                for loss, harm in zip(self.losses, self.causes, strict=True)
            ],
        }


@dataclass(slots=True)
class Report:
    """violations: streams for which a law does not hold, each with what is wrong and all that it got."""

    figures: dict[str, Any]
    violations: list[dict[str, Any]]


async def run(folder: Path, options: Options) -> Report:
    """Start the nodes in the folder, ask, disturb, compare."""
    mesh = Mesh(folder)
    try:
        return await _Chaos(mesh, options).run()
    finally:
        mesh.close()


class _Chaos:
    def __init__(self, mesh: Mesh, options: Options) -> None:
        self._mesh = mesh
        self._options = options
        self._rng = random.Random(options.seed)
        self._attempts: list[Attempt] = []
        self._violations: list[dict[str, Any]] = []
        self._counts: Counter[str] = Counter()
        self._workload = Workload()
        self._models: list[NodeProcess] = []
        self._edge: list[NodeProcess] = []
        self._done = 0
        self._own_stalls: list[tuple[float, float]] = []  # (until, seconds) in which this process stood still

    async def run(self) -> Report:
        options = self._options
        first = await trio.to_thread.run_sync(self._mesh.add)
        progress(f"right answers of {options.streams} streams, from one node")
        self._workload = await prepare(first.http, options.streams, options.seed, options.tokens)
        prefill_token_s = await _prefill_token_s(first.http)
        for _ in range(options.nodes - 1):
            await trio.to_thread.run_sync(self._mesh.add)
        self._models = list(self._mesh.nodes)
        if options.edge:
            self._edge = [await trio.to_thread.run_sync(lambda: self._mesh.add("--no-model", name="edge"))]
        await trio.to_thread.run_sync(self._mesh.wait_until_agreed)
        disturber = Disturber(self._models, self._rng, self._keep_counts)
        started = time.monotonic()
        async with trio.open_nursery() as nursery:
            if options.kill:
                nursery.start_soon(disturber.run, options.harms_max)
            nursery.start_soon(self._tell, disturber)
            nursery.start_soon(self._watch_itself, disturber)
            await self._ask_all(disturber)
            seconds = time.monotonic() - started
            disturber.finished.set()
            free_s = await self._free_after_s(disturber.up() + self._edge)
        restarted_free_s = await self._free_after_s(self._mesh.nodes)
        for node in self._mesh.nodes:
            self._keep_counts(node)
        pauses = list(self._pauses(disturber.harms, prefill_token_s))
        for kind in PAUSE_KINDS:
            alike = [pause for pause in pauses if pause.kind == kind]
            for pause in sorted(alike, key=lambda pause: -pause.seconds)[:PAUSES_TOLD]:
                progress(f"long pause: {json.dumps(pause.story())}")
        return Report(self._figures(disturber, pauses, seconds, max(free_s, restarted_free_s)), self._violations)

    # Asking.

    async def _ask_all(self, disturber: Disturber) -> None:
        cases = iter(self._workload.cases)

        async def client() -> None:
            for case in cases:
                await self._ask(case, disturber)
                self._done += 1

        async with trio.open_nursery() as nursery:
            for _ in range(self._options.concurrency):
                nursery.start_soon(client)

    async def _ask(self, case: Case, disturber: Disturber) -> None:
        """As a client does: where its entry breaks, again at another node."""
        right = self._workload.right[case.index]
        for number in range(ATTEMPTS_MAX):
            entry = self._rng.choice(disturber.up() + self._edge)
            request_id = f"chaos-{case.index}-{number}"
            answer = await ask(entry.http, case.body, headers={"x-request-id": request_id})
            attempt = Attempt(case, request_id, entry.name, answer)
            attempt.harms = disturber.touched(entry.name, answer.started_at, answer.ended_at)
            self._attempts.append(attempt)
            if answer.ending == "done" or not attempt.harms:
                self._judge(attempt, difference(answer, right))
                self._counts["done"] += answer.ending == "done"
                return
            self._judge(attempt, prefix_difference(answer, right))
            self._counts[f"repeated_{_kind(attempt)}"] += 1
        self._judge(attempt, f"broke {ATTEMPTS_MAX} times")

    def _judge(self, attempt: Attempt, fault: str | None) -> None:
        answer, case = attempt.answer, attempt.case
        is_spared = not attempt.harms
        if answer.ending == "done" or is_spared:
            self._counts["spared" if is_spared else f"outlived_{_kind(attempt)}"] += 1
            self._counts[f"exact_{case.kind}"] += fault is None
            self._counts["spared_exact"] += is_spared and fault is None
        if fault is None:
            return
        right = self._workload.right[case.index]
        self._violations.append(
            {
                "fault": fault,
                "request_id": attempt.request_id,
                "kind": case.kind,
                "entry": attempt.entry,
                "entry_harmed": [harm.kind for harm in attempt.harms],
                "body": case.body,
                "ending": answer.ending,
                "seconds": round(answer.ended_at - answer.started_at, 3),
                "usage": answer.usage,
                "text": {index: choice.text for index, choice in answer.choices.items()},
                "right_usage": right.usage,
                "right_text": {index: choice.text for index, choice in right.choices.items()},
            }
        )
        progress(f"VIOLATION {json.dumps(self._violations[-1])}")

    async def _tell(self, disturber: Disturber) -> None:
        while not disturber.finished.is_set():
            with trio.move_on_after(PROGRESS_INTERVAL_S):
                await disturber.finished.wait()
            up = ", ".join(node.name for node in disturber.up())
            progress(f"{self._done} of {len(self._workload.cases)} streams, {len(disturber.harms)} harms, up: {up}")

    async def _watch_itself(self, disturber: Disturber) -> None:
        while not disturber.finished.is_set():
            due = time.monotonic() + OWN_TICK_S
            await trio.sleep(OWN_TICK_S)
            if (late_s := time.monotonic() - due) >= OWN_LATE_MIN_S:
                self._own_stalls.append((due + late_s, late_s))

    # What the nodes say.

    def _keep_counts(self, node: NodeProcess) -> None:
        """Called in a thread, before the node's life ends and its counts with it."""
        for line in node.request("/metrics")[1].decode().splitlines():
            name, _, value = line.rpartition(" ")
            if name.startswith(("ai_cluster_failovers_total", "ai_cluster_answers_lost_total")):
                self._counts[name.removeprefix("ai_cluster_")] += int(float(value))

    async def _free_after_s(self, nodes: list[NodeProcess]) -> float:
        seconds, taken = await trio.to_thread.run_sync(free_after_s, nodes, FREE_TIMEOUT_S)
        if taken:
            self._violations.append({"fault": f"after {seconds:g} s slots, streams or queues are taken: {taken}"})
        return seconds

    def _pauses(self, harms: list[Harm], prefill_token_s: float) -> Iterator[Pause]:
        """Of the streams that reached their end through entries left alone, each gap in which a node failed them."""
        losses: dict[str, list[_Loss]] = {}
        resumptions: dict[str, list[_Resumption]] = {}
        for line in _logged(self._mesh.nodes):
            if isinstance(line, _Loss):
                losses.setdefault(line.request_id, []).append(line)
            else:
                resumptions.setdefault(line.request_id, []).append(line)
        for attempt in self._attempts:
            found = [loss for loss in losses.get(attempt.request_id, ()) if loss.tokens]
            if not found or attempt.harms or attempt.answer.ending != "done" or attempt.case.kind == ENDLESS:
                continue
            usage = attempt.answer.usage or {"prompt_tokens": 0}
            times = attempt.answer.text_times
            median = statistics.median([b - a for a, b in pairwise(times)])
            for a, b in pairwise(times):
                inside = [loss for loss in found if a < loss.at + CLOCK_SLACK_S and loss.at < b + CLOCK_SLACK_S]
                if not inside or b - a < CLOCK_SLACK_S:
                    continue
                found = [loss for loss in found if loss not in inside]
                prefill_s = prefill_token_s * (usage["prompt_tokens"] + inside[-1].tokens)
                causes = [_cause(harms, loss) for loss in inside]
                later = (r for r in resumptions.get(attempt.request_id, ()) if r.at >= inside[-1].at)
                onto = min(later, key=lambda resumption: resumption.at, default=None)
                onto_harms = [h for h in harms if onto and h.node == onto.peer and h.touches(a, b)]
                harmed_at = min((harm.begun_at for harm in causes if harm is not None), default=a)
                seconds = b - max(a, harmed_at) - median - prefill_s
                late_s = max((late for until, late in self._own_stalls if a <= until <= b + OWN_TICK_S), default=0.0)
                yield Pause(attempt.request_id, seconds, a, b, inside, causes, onto, onto_harms, late_s)
            self._counts["failovers_without_a_gap"] += len(found)

    def _figures(self, disturber: Disturber, pauses: list[Pause], seconds: float, free_s: float) -> dict[str, Any]:
        counts, options = self._counts, self._options
        by_kind = {kind: [pause.seconds for pause in pauses if pause.kind == kind] for kind in PAUSE_KINDS}
        kill, stop = by_kind["kill"], by_kind["stop"]
        spared_faults = sum(1 for v in self._violations if v.get("entry_harmed") == [])
        return {
            "seed": options.seed,
            "nodes": options.nodes,
            "concurrency": options.concurrency,
            "seconds": round(seconds, 1),
            "streams": len(self._workload.cases),
            "done": counts["done"],
            "entry_spared": counts["spared"],
            "entry_spared_exact": counts["spared_exact"],
            "outlived_a_stop_of_the_entry": counts["outlived_stop"],
            "repeated_after_kill_of_the_entry": counts["repeated_kill"],
            "repeated_after_stop_of_the_entry": counts["repeated_stop"],
            "exact_by_kind": {kind: counts[f"exact_{kind}"] for kind in _kinds(self._workload)},
            "not_served": self._workload.not_served,
            "kills": sum(harm.killed_at is not None for harm in disturber.harms),
            "stops": sum(harm.kind == "stop" for harm in disturber.harms),
            "counted_by_nodes": {name: count for name, count in sorted(counts.items()) if "_total" in name},
            "failovers_without_a_gap": counts["failovers_without_a_gap"],
            "pause_s": {kind: quantiles(seconds) for kind, seconds in by_kind.items()},
            "free_after_s": round(free_s, 2),
            "laws": {
                "errors": law(spared_faults, at_most=0),
                "prefixes": law(len(self._violations) - spared_faults, at_most=0),
                "pause_kill_s": law(quantile(kill, 0.99), at_most=PAUSE_KILL_MAX_S),
                "pause_stop_s": law(quantile(stop, 0.99), at_most=PAUSE_STOP_MAX_S),
                "free_s": law(free_s, at_most=FREE_MAX_S),
            },
        }


@dataclass(frozen=True, slots=True)
class _Loss:
    """What an entry logged of a node that failed an answer. at: as time.monotonic(). tokens: of the answer so far."""

    request_id: str
    peer: str
    at: float
    tokens: int
    error: str


@dataclass(frozen=True, slots=True)
class _Resumption:
    """What an entry logged of the node that went on."""

    request_id: str
    peer: str
    at: float


def _logged(nodes: list[NodeProcess]) -> Iterator[_Loss | _Resumption]:
    offset = time.time() - time.monotonic()
    for node in nodes:
        for line in (node.folder / "logs" / "combined.log").read_text().splitlines():
            if LOSS_MESSAGE not in line and RESUMPTION_MESSAGE not in line:
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the last line of a node that was killed
                continue
            at = datetime.fromisoformat(record["@timestamp"]).timestamp() - offset
            if record["message"] == LOSS_MESSAGE:
                tokens, error = record["completion_tokens"], record["error.message"]
                yield _Loss(record["request_id"], record["peer"], at, tokens, error)
            elif record["message"] == RESUMPTION_MESSAGE:
                yield _Resumption(record["request_id"], record["peer"], at)


def _cause(harms: list[Harm], loss: _Loss) -> Harm | None:
    """The last harm done to the node before it failed."""
    before = [harm for harm in harms if harm.node == loss.peer and harm.begun_at <= loss.at + CLOCK_SLACK_S]
    return max(before, key=lambda harm: harm.begun_at, default=None)


def _kind(attempt: Attempt) -> str:
    return "kill" if any(harm.kind == "kill" for harm in attempt.harms) else "stop"


def _kinds(workload: Workload) -> list[str]:
    return sorted({case.kind for case in workload.cases})


async def _prefill_token_s(address: str) -> float:
    """Seconds an idle engine takes for one more token of a prompt."""
    found: list[float] = []
    for number in range(5):
        times: list[float] = []
        tokens: list[int] = []
        for words in (10, 100):
            text = f"{number} " + " ".join(f"w{number}{word}" for word in range(words))
            message = [{"role": "user", "content": text}]
            body = {"model": "demo", "messages": message, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
            answer = await ask(address, body | {"stream": True, "stream_options": {"include_usage": True}})
            assert answer.ending == "done", answer.error
            assert answer.usage is not None
            times.append(answer.ended_at - answer.started_at)
            tokens.append(answer.usage["prompt_tokens"])
        found.append((times[1] - times[0]) / (tokens[1] - tokens[0]))
    return max(0.0, statistics.median(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--kill", action="store_true", help="harm nodes; without it they are left alone")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--concurrency", type=int, default=12, help="streams at a time")
    parser.add_argument("--seed", type=int, default=7, help="of the requests and of what is done to whom")
    parser.add_argument("--tokens", type=int, nargs=2, default=(300, 900), metavar=("LEAST", "MOST"))
    parser.add_argument("--edge", action="store_true", help="an entry without a model more, which is never harmed")
    given = parser.parse_args()
    options = Options(
        streams=given.streams,
        nodes=given.nodes,
        concurrency=given.concurrency,
        seed=given.seed,
        tokens=tuple(given.tokens),
        kill=given.kill,
        edge=given.edge,
    )
    progress(f"seed {options.seed}")
    garbage.settle()  # this client's own pauses would look like the mesh's
    with tempfile.TemporaryDirectory() as folder:
        report = trio.run(run, Path(folder), options)
    finish(report.figures, report.violations)


if __name__ == "__main__":
    main()
