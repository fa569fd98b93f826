"""Ranks the nodes that could serve a request by the estimated time to its first token. Sees no socket and no clock.

The estimate for one node, in seconds:

    prefill   tokens to prefill before the first token / prefill rate. The tokens are this prompt's and those queued
              ahead of it: the engine prefills one sequence at a time, in arrival order.
    decode    a decode step for each prefill chunk, as the engine alternates them: chunks x active / decode rate. The
              rate is the total over the batch, so active / rate is the length of one step.
    slot      nothing while a slot is free for it. Else (position in the queue) x (answer length / decode rate): with
              answers of L tokens, slots become free at rate / L a second (Little's law).
    hop       what a peer link adds.

Gossip is a second old. What this node has dispatched since a peer's last report is added to that report, so a burst
does not pile up on the node that was best when it began. Among near-equal nodes the choice is random, or all entries
would send to the same one; of two random candidates the less occupied goes first, which evens out most of what pure
chance leaves uneven (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001).
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from mesh.errors import ModelUnknown, NoCapacity
from mesh.view import ClusterView, MemberView, ModelInfo, ModelLoad

BYTES_PER_TOKEN = 4  # of English text in usual tokenizers; only ratios between nodes matter
PREFILL_CHUNK_TOKENS = 64  # as the engine cuts them
# Tokens per second assumed until a node has measured its own: a small model on two cores.
PREFILL_RATE_DEFAULT = 500.0
DECODE_RATE_DEFAULT = 100.0
RATE_MIN = 0.01  # a slower one is a stall; keeps every estimate finite
ANSWER_TOKENS_DEFAULT = 256  # how long an answer is thought to be; most clients set no limit
HOP_S = 0.002  # a request and its first event over a peer link, loaded loops included
# Estimates this close say nothing about which node is sooner: they rest on a report up to a second old.
NEAR_TIE_S = 0.005
NEAR_TIE_SHARE = 0.10
# A report that arrives this soon after a dispatch may have been written before the dispatch reached its node.
REPORT_DELAY_S = 0.25
# Own dispatches remembered per node and model; at more per report interval every node is full anyway.
OWN_DISPATCHES_MAX = 4096
# Pairs of node and model with own dispatches. Forgetting one makes its node look idler for at most a second.
LEDGERS_MAX = 4096
RETRY_AFTER_MIN_S = 1.0
RETRY_AFTER_MAX_S = 60.0
RETRY_NOT_READY_S = 5.0  # about what loading a model or the verdict on a suspect takes
MODEL_NAME_CHARS_SHOWN = 100  # clients choose the name, and error messages quote it


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What is to be placed. prompt_bytes: size of its text. exclude: node ids that failed it already. blocks: names of
    the beginnings of its conversation, shortest first. fingerprint: of the one model it may go to; empty for any."""

    model: str
    prompt_bytes: int
    exclude: frozenset[str] = frozenset()
    blocks: tuple[int, ...] = ()
    fingerprint: str = ""


class OwnDispatch:
    """A request this node has sent and its executor's report may not contain yet."""

    __slots__ = ("_ledger", "at", "is_counted", "load_version", "tokens")

    def __init__(self, ledger: _Ledger, tokens: int, load_version: int, at: float) -> None:
        self._ledger = ledger
        self.tokens = tokens
        self.load_version = load_version
        self.at = at
        self.is_counted = True

    def finish(self) -> None:
        if self.is_counted:
            self.is_counted = False
            self._ledger.count -= 1
            self._ledger.tokens -= self.tokens


@dataclass(slots=True)
class _Ledger:
    """The own dispatches to one node and model, oldest first, and their sums."""

    entries: deque[OwnDispatch] = field(default_factory=deque)
    count: int = 0
    tokens: int = 0

    def add(self, entry: OwnDispatch) -> None:
        if len(self.entries) >= OWN_DISPATCHES_MAX:
            self.entries.popleft().finish()
        self.entries.append(entry)
        self.count += 1
        self.tokens += entry.tokens

    def prune(self, load_version: int, now: float) -> None:
        """Forget what is finished, and what a report of `load_version`, seen at `now`, contains."""
        while self.entries:
            entry = self.entries[0]
            is_reported = load_version != entry.load_version and now - entry.at >= REPORT_DELAY_S
            if entry.is_counted and not is_reported:
                return
            self.entries.popleft().finish()


@dataclass(frozen=True, slots=True)
class _Candidate:
    node_id: str
    estimate_s: float
    occupancy: float  # requests per slot
    is_local: bool


class Router:
    """Keeps only this node's own recent dispatches. Call dispatched() after rank() before anything is awaited, or
    requests that arrive together are ranked without each other."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._ledgers: dict[tuple[str, str], _Ledger] = {}
        self._now = 0.0

    def rank(self, view: ClusterView, request: RouteRequest, now: float) -> list[str]:
        """Node ids that may take the request, soonest first; never empty.

        Raises ModelUnknown when no member has the model, NoCapacity when none that has it may take the request now.
        """
        self._now = now
        members = view.members.values()
        owners = [(member, info) for member in members if (info := member.model(request.model)) is not None]
        if not owners:
            raise ModelUnknown(f"no node has a model named {request.model[:MODEL_NAME_CHARS_SHOWN]!r}")
        candidates = []
        full = []
        for member, info in owners:
            if member.node_id in request.exclude or not view.is_routable(member):
                continue
            if request.fingerprint and info.fingerprint != request.fingerprint:
                continue
            load, own = self._load_of(member, info, now)
            if load.queued + own.count - load.free_slots >= info.queue_limit:
                full.append(load)
            else:
                candidates.append(_candidate(member, info, load, own, request.prompt_bytes))
        if not candidates:
            raise self._no_capacity(request, owners, full)
        return self._order(candidates)

    def dispatched(
        self,
        node_id: str,
        model: str,
        prompt_bytes: int,
        load_version: int,
        *,
        blocks: tuple[int, ...] = (),
        generation: int = 0,
    ) -> OwnDispatch:
        """Count a request towards a node until its report contains it. load_version: of the view it was ranked with."""
        key = (node_id, model)
        ledger = self._ledgers.get(key)
        if ledger is None:
            if len(self._ledgers) >= LEDGERS_MAX:
                del self._ledgers[next(iter(self._ledgers))]
            ledger = self._ledgers[key] = _Ledger()
        entry = OwnDispatch(ledger, _tokens(prompt_bytes), load_version, self._now)
        ledger.add(entry)
        return entry

    def finished(self, dispatch: OwnDispatch) -> None:
        """What dispatched() returned has ended, or never began. Any number of times."""
        dispatch.finish()

    def _load_of(self, member: MemberView, info: ModelInfo, now: float) -> tuple[ModelLoad, _Ledger]:
        """The member's last report, and what to add to it. A model that is not in the report yet is idle."""
        load = member.load.models.get(info.name) or ModelLoad(free_slots=info.slots)
        ledger = self._ledgers.get((member.node_id, info.name))
        if ledger is None:
            return load, _Ledger()
        ledger.prune(member.load_version, now)
        return load, ledger

    def _order(self, candidates: list[_Candidate]) -> list[str]:
        candidates.sort(key=lambda candidate: candidate.estimate_s)
        ordered: list[str] = []
        while candidates:
            best_s = candidates[0].estimate_s
            limit_s = best_s + max(NEAR_TIE_S, best_s * NEAR_TIE_SHARE)
            size = sum(candidate.estimate_s <= limit_s for candidate in candidates)
            near, candidates = candidates[:size], candidates[size:]
            self._rng.shuffle(near)
            # The hop is saved where it costs no balance: an idle mesh answers where it is asked.
            local = next((candidate for candidate in near if candidate.is_local), None)
            if local is not None and local.occupancy <= min(candidate.occupancy for candidate in near):
                near.remove(local)
                ordered.append(local.node_id)
            while len(near) > 1:  # the two last are a random pair
                if near[-2].occupancy < near[-1].occupancy:
                    near[-2], near[-1] = near[-1], near[-2]
                ordered.append(near.pop().node_id)
            ordered.extend(candidate.node_id for candidate in near)
        return ordered

    def _no_capacity(
        self, request: RouteRequest, owners: list[tuple[MemberView, ModelInfo]], full: list[ModelLoad]
    ) -> NoCapacity:
        """retry_after_s: until the shortest queue would have drained at the rate at which slots become free."""
        failed = sum(member.node_id in request.exclude for member, _ in owners)
        message = (
            f"no node can take a request for the model {request.model[:MODEL_NAME_CHARS_SHOWN]!r} now; of its nodes "
            f"{len(full)} have a full queue, {failed} failed it, {len(owners) - len(full) - failed} are not ready"
        )
        if full:
            wait_s = min(load.queued * _slot_interval_s(load) for load in full)
        else:
            wait_s = RETRY_AFTER_MIN_S if failed else RETRY_NOT_READY_S
        return NoCapacity(message, min(max(wait_s, RETRY_AFTER_MIN_S), RETRY_AFTER_MAX_S))


def _candidate(member: MemberView, info: ModelInfo, load: ModelLoad, own: _Ledger, prompt_bytes: int) -> _Candidate:
    """The module's docstring gives the formula."""
    prefill_tokens = load.queued_tokens + own.tokens + _tokens(prompt_bytes)
    prefill_s = prefill_tokens / _rate(load.prefill_rate, PREFILL_RATE_DEFAULT)
    chunks = -(-prefill_tokens // PREFILL_CHUNK_TOKENS)
    decode_s = chunks * load.active / _rate(load.decode_rate, DECODE_RATE_DEFAULT)
    waiting = load.queued + own.count
    slot_s = max(0, waiting + 1 - load.free_slots) * _slot_interval_s(load)
    hop_s = 0.0 if member.is_self else HOP_S
    occupancy = (load.active + waiting) / max(1, info.slots)
    return _Candidate(member.node_id, prefill_s + decode_s + slot_s + hop_s, occupancy, member.is_self)


def _slot_interval_s(load: ModelLoad) -> float:
    """Seconds from one slot becoming free to the next, with all of them busy."""
    return ANSWER_TOKENS_DEFAULT / _rate(load.decode_rate, DECODE_RATE_DEFAULT)


def _rate(measured: float, default: float) -> float:
    return max(measured, RATE_MIN) if measured > 0.0 else default


def _tokens(prompt_bytes: int) -> int:
    return max(1, prompt_bytes // BYTES_PER_TOKEN)
