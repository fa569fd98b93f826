"""Ranks the nodes that could serve a request by the estimated time to its first token. Sees no socket and no clock.

mesh.first_token gives the estimate; a peer costs a hop more. What a node's prefix cache holds of the prompt
(mesh.prefix_digests) shortens its prefill and nothing else, and where the request would have to wait for a slot it
counts for nothing as long as another candidate has a free one.

Gossip is a second old. What this node has dispatched since a peer's last report is added to that report, so a burst
does not pile up on the node that was best when it began. Among near-equal nodes the choice is random, or all entries
would send to the same one; of two random candidates the less occupied goes first, which evens out most of what pure
chance leaves uneven (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001). The more the other
entries have sent since the reports, the more nodes are as good as the best, with mesh.stale_reports.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from mesh.errors import ModelUnknown, NoCapacity
from mesh.first_token import BYTES_PER_TOKEN, added_s, answers_per_s, first_token_s, tokens_of
from mesh.own_dispatches import Ledger, OwnDispatch
from mesh.prefix_digests import OwnMark, PrefixDigests
from mesh.retry_after import RETRY_AFTER_MAX_S, RETRY_AFTER_MIN_S, RetryQueue
from mesh.stale_reports import DispatchRate, water_level
from mesh.view import GENERATION, ClusterView, MemberView, ModelInfo, ModelLoad

__all__ = ["RETRY_AFTER_MAX_S", "RETRY_AFTER_MIN_S", "OwnDispatch", "RouteRequest", "Router"]

HOP_S = 0.002  # a request and its first event over a peer link, loaded loops included
BLOCK_BYTES = 256  # of a conversation's text; as nodes.engine.prefix_digest cuts it
BLOCK_TOKENS = BLOCK_BYTES // BYTES_PER_TOKEN
# Estimates this close say nothing about which node is sooner: they rest on a report up to a second old.
NEAR_TIE_S = 0.005
NEAR_TIE_SHARE = 0.10
COST_MIN_S = 1e-6  # of a request, where a node reports none
# Pairs of node and model with own dispatches. Forgetting one makes its node look idler for at most a second.
LEDGERS_MAX = 4096
RETRY_NOT_READY_S = 5.0  # about what loading a model or the verdict on a suspect takes
MODELS_MAX = 1024  # with refused clients; forgetting one's promises makes their clients new ones
# Of the places in all queues, what is held for refused clients whose time has come: the rest keeps the engines busy.
HELD_SHARE = 0.5
PROMPT_SHARE = 1 / 16  # of the newest prompt in the running mean of their lengths
MODEL_NAME_CHARS_SHOWN = 100  # clients choose the name, and error messages quote it


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What is to be placed. prompt_bytes: size of its text. exclude: node ids that failed it already. blocks: names of
    the beginnings of its conversation, shortest first. fingerprint: of the one model it may go to; empty for any.
    is_resumed: another node has begun the answer; engines take it beyond a full queue, which has its own bound there.
    was_refused: one of exclude had no place for it. kind: of the model. identity: a hash of who asks what, by which a
    client that comes back is known; equal for the same request sent again."""

    model: str
    prompt_bytes: int
    exclude: frozenset[str] = frozenset()
    blocks: tuple[int, ...] = ()
    fingerprint: str = ""
    is_resumed: bool = False
    was_refused: bool = False
    kind: str = GENERATION
    identity: int = 0


@dataclass(slots=True)
class _Traffic:
    """Of one model, as this entry sees it: who was refused, how long prompts are that had to be prefilled, and how many
    come a second."""

    retries: RetryQueue
    prompt_tokens: float
    rate: DispatchRate


@dataclass(frozen=True, slots=True)
class _Candidate:
    node_id: str
    estimate_s: float
    occupancy: float  # requests per slot
    is_local: bool
    uncached_s: float  # the estimate for a prompt of which nothing is cached
    added_s: float  # by which one more request raises the estimate


_Placeable = tuple[MemberView, ModelInfo, ModelLoad, Ledger]
_NO_DISPATCHES = Ledger()


class Router:
    """Keeps only this node's own recent dispatches, and what it promised whom it refused. Call dispatched() after
    rank() before anything is awaited, or requests that arrive together are ranked without each other."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._ledgers: dict[tuple[str, str], Ledger] = {}
        self._digests = PrefixDigests()
        self._marks: dict[OwnDispatch, tuple[str, OwnMark]] = {}  # of dispatches that run
        self._traffic: dict[str, _Traffic] = {}
        self._matches: tuple[tuple[int, ...], dict[str, int]] = ((), {})  # of the latest request ranked
        self._now = 0.0
        self.latest_estimate_s = 0.0  # to its first token, of the node that the latest rank() put first

    def rank(self, view: ClusterView, request: RouteRequest, now: float) -> list[str]:
        """Node ids that may take the request, soonest first; never empty. Witnessed nodes are among them only where
        every node that could serve it, full ones included, is one.

        Raises ModelUnknown when no member has the model, NoCapacity when none that has it may take the request now: its
        retry_after_s is then a promise, and whoever comes back at that time goes before new requests.
        """
        self._now = now
        owners = _owners(view, request)
        if not owners:
            raise ModelUnknown(f"no node has a model named {request.model[:MODEL_NAME_CHARS_SHOWN]!r}")
        placeable: list[_Placeable] = []
        full: list[_Placeable] = []
        able = [
            (member, info)
            for member, info in owners
            if member.node_id not in request.exclude
            and view.is_routable(member)
            and request.fingerprint in ("", info.fingerprint)
        ]
        # A client that is told when to come back is better off than one whose request hangs until it is moved.
        for member, info in [owner for owner in able if owner[0].node_id not in view.witnessed] or able:
            load, own = self._load_of(member, info, view.now)
            has_room = request.is_resumed or load.queued + own.count - load.free_slots < info.queue_limit
            (placeable if has_room else full).append((member, info, load, own))
        if not placeable or not self._is_its_turn(request, placeable, now):
            raise self._no_capacity(view, request, owners, placeable, full)
        matches = self._match(view, request, owners)
        prompt_tokens = self._traffic_of(request.model, tokens_of(request.prompt_bytes)).prompt_tokens
        unseen = self._unseen_arrivals(view, request.model, placeable)
        candidates = _candidates(placeable, request.prompt_bytes, matches, prompt_tokens)
        order = self._order(candidates, unseen)
        self.latest_estimate_s = next(c.estimate_s for c in candidates if c.node_id == order[0])
        return order

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
        """Count a request towards a node until its report contains it. load_version, generation: of the node in the
        view it was ranked with. blocks: the node holds this conversation from now on."""
        key = (node_id, model)
        ledger = self._ledgers.get(key)
        if ledger is None:
            if len(self._ledgers) >= LEDGERS_MAX:
                del self._ledgers[next(iter(self._ledgers))]
            ledger = self._ledgers[key] = Ledger()
        ranked, matches = self._matches
        cached = matches.get(node_id, 0) if blocks and ranked == blocks else 0
        tokens = _uncached_tokens(prompt_bytes, cached)
        entry = ledger.add(tokens, self._now)
        traffic = self._traffic_of(model, tokens)
        traffic.prompt_tokens += (tokens - traffic.prompt_tokens) * PROMPT_SHARE
        traffic.rate.note(self._now)
        mark = self._digests.dispatched(node_id, model, blocks, generation)
        if mark is not None:
            self._marks[entry] = node_id, mark
        return entry

    def refused(self, view: ClusterView, request: RouteRequest, now: float) -> NoCapacity:
        """What to raise when the nodes tried (request.exclude) had no place after all: with a promise as rank()'s."""
        self._now = now
        owners = _owners(view, request)
        nodes = [(member, info, *self._load_of(member, info, view.now)) for member, info in owners]
        message = (
            f"no node can take a request for the model {request.model[:MODEL_NAME_CHARS_SHOWN]!r} now; "
            f"{len(request.exclude)} of its nodes were tried"
        )
        return NoCapacity(message, self._promise_s(view, request, nodes))

    def opened(self, dispatch: OwnDispatch) -> None:
        """The node's row in the view contains it from now on, as the own row does. Any number of times."""
        dispatch.count_no_more()

    def finished(self, dispatch: OwnDispatch) -> None:
        """What dispatched() returned has ended, or never began. Any number of times."""
        dispatch.finish()
        ended = self._marks.pop(dispatch, None)
        if ended is not None:
            self._digests.ended(*ended)

    def _load_of(self, member: MemberView, info: ModelInfo, seen_at: float) -> tuple[ModelLoad, Ledger]:
        """The member's last report, and what to add to it. A model that is not in the report yet is idle."""
        load = member.load.models.get(info.name) or ModelLoad(free_slots=info.slots)
        ledger = self._ledgers.get((member.node_id, info.name))
        if ledger is None:
            return load, _NO_DISPATCHES
        if not member.is_self:  # the own row is always now; what it does not contain yet is said by opened()
            ledger.prune(seen_at - member.load_age_s)
        return load, ledger

    def _match(
        self, view: ClusterView, request: RouteRequest, owners: Sequence[tuple[MemberView, ModelInfo]]
    ) -> dict[str, int]:
        if not request.blocks:
            return {}
        for member, _ in owners:
            self._digests.learn(member)
        matches = self._digests.matches(request.model, request.blocks, view.members)
        self._matches = request.blocks, matches
        return matches

    def _unseen_arrivals(self, view: ClusterView, model: str, nodes: Sequence[_Placeable]) -> float:
        """How many requests other entries have sent to these nodes since their reports, peers' only."""
        ages_s = [member.load_age_s for member, *_ in nodes if not member.is_self]
        if not ages_s or model not in self._traffic:
            return 0.0
        others = 1 / _own_share(view, nodes) - 1
        return self._traffic[model].rate.per_s(self._now) * others * sum(ages_s) / len(ages_s)

    def _order(self, candidates: list[_Candidate], unseen: float) -> list[str]:
        """unseen: requests that the estimates of the peers among them do not contain."""
        candidates.sort(key=lambda candidate: candidate.estimate_s)
        ordered = self._spread(candidates, unseen)
        candidates = [candidate for candidate in candidates if candidate.node_id not in ordered]
        start = 0
        while start < len(candidates):
            limit_s = _near_tie_s(candidates[start].estimate_s)
            end = start + 1
            while end < len(candidates) and candidates[end].estimate_s <= limit_s:
                end += 1
            near = candidates[start:end]
            start = end
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

    def _spread(self, candidates: Sequence[_Candidate], unseen: float) -> list[str]:
        """The node that goes first because others have sent so many where it looks best; none where few have."""
        peers = [candidate for candidate in candidates if not candidate.is_local]
        if not peers or unseen <= 0.0:
            return []
        # The others' requests have other beginnings: what a node has cached of this one draws none of them.
        peers.sort(key=lambda peer: peer.uncached_s)
        level_s = water_level([p.uncached_s for p in peers], [max(p.added_s, COST_MIN_S) for p in peers], unseen)
        if level_s <= _near_tie_s(peers[0].uncached_s):
            return []
        # Of the own row nothing is unseen.
        expected = [(c.estimate_s + (0.0 if c.is_local else max(0.0, level_s - c.uncached_s)), c) for c in candidates]
        limit_s = _near_tie_s(min(expected_s for expected_s, _ in expected))
        near = [candidate for expected_s, candidate in expected if expected_s <= limit_s]
        local = next((candidate for candidate in near if candidate.is_local), None)
        if local is not None:
            return [local.node_id]
        weights = [max(0.0, level_s - c.uncached_s) / max(c.added_s, COST_MIN_S) for c in near]
        return [(self._rng.choices(near, weights)[0] if sum(weights) > 0.0 else near[0]).node_id]

    # Who is refused, and until when.

    def _is_its_turn(self, request: RouteRequest, placeable: Sequence[_Placeable], now: float) -> bool:
        """Whether the request may have a place now, those promised one considered."""
        traffic = self._traffic.get(request.model)
        if traffic is None or not traffic.retries or request.exclude or request.is_resumed:
            return True  # one that other nodes failed has had its turn
        places = sum(info.queue_limit + load.free_slots - load.queued - own.count for _, info, load, own in placeable)
        held_max = int(HELD_SHARE * sum(info.queue_limit for _, info, _, _ in placeable))
        return traffic.retries.admits(request.identity, places, held_max, now)

    def _no_capacity(
        self,
        view: ClusterView,
        request: RouteRequest,
        owners: Sequence[tuple[MemberView, ModelInfo]],
        placeable: Sequence[_Placeable],
        full: Sequence[_Placeable],
    ) -> NoCapacity:
        tried = [(member, info) for member, info in owners if member.node_id in request.exclude]
        failed = len(tried)
        name = request.model[:MODEL_NAME_CHARS_SHOWN]
        message = (
            f"no node can take a request for the model {name!r} now; of its nodes {len(full)} have a full queue, "
            f"{len(placeable)} have places for those who wait longer, {failed} failed it, "
            f"{len(owners) - len(full) - len(placeable) - failed} are not ready or make no progress"
        )
        nodes = [*full, *placeable]
        if not nodes and request.was_refused:
            nodes = [(*owner, *self._load_of(*owner, view.now)) for owner in tried]
        if not nodes and failed:
            return NoCapacity(message, RETRY_AFTER_MIN_S)
        return NoCapacity(message, self._promise_s(view, request, nodes))

    def _promise_s(self, view: ClusterView, request: RouteRequest, nodes: Sequence[_Placeable]) -> float:
        """Until the request may come back, which goes before new ones then. nodes: those whose places it waits for."""
        if not nodes:
            return RETRY_NOT_READY_S
        traffic = self._traffic_of(request.model, tokens_of(request.prompt_bytes))
        rate_per_s = self._places_per_s(view, nodes, traffic.prompt_tokens)
        return traffic.retries.refuse(request.identity, rate_per_s, self._now, is_next=bool(request.exclude))

    def _places_per_s(self, view: ClusterView, nodes: Sequence[_Placeable], prompt_tokens: float) -> float:
        """How often this entry is given a place: as many answers as the nodes complete a second, times its share. Of
        all requests that are in their slots and queues it sent so many, so it will get that part of their places."""
        return sum(answers_per_s(load, prompt_tokens) for _, _, load, _ in nodes) * _own_share(view, nodes)

    def _traffic_of(self, model: str, prompt_tokens: int) -> _Traffic:
        traffic = self._traffic.get(model)
        if traffic is None:
            if len(self._traffic) >= MODELS_MAX:
                del self._traffic[next(iter(self._traffic))]
            traffic = self._traffic[model] = _Traffic(RetryQueue(), float(prompt_tokens), DispatchRate())
        return traffic


def _owners(view: ClusterView, request: RouteRequest) -> list[tuple[MemberView, ModelInfo]]:
    owners = []
    for member in view.members.values():
        for info in member.profile.models:
            if info.name == request.model and info.kind == request.kind:
                owners.append((member, info))
                break
    return owners


def _near_tie_s(best_s: float) -> float:
    """Up to which an estimate is as good as the best."""
    return best_s + max(NEAR_TIE_S, best_s * NEAR_TIE_SHARE)


def _own_share(view: ClusterView, nodes: Sequence[_Placeable]) -> float:
    """Of all requests at these nodes, the part this entry has sent; at least what is one member's."""
    present = sum(load.active + load.queued + own.count for _, _, load, own in nodes)
    own_open = sum(own.open for _, _, _, own in nodes)
    fair_share = 1 / max(1, sum(view.is_routable(member) for member in view.members.values()))
    return min(1.0, max(fair_share, own_open / max(1, present)))


def _candidates(
    placeable: Sequence[_Placeable], prompt_bytes: int, matches: dict[str, int], prompt_tokens_mean: float
) -> list[_Candidate]:
    has_free_slot = any(load.free_slots > load.queued + own.count for _, _, load, own in placeable)
    tokens = tokens_of(prompt_bytes)
    candidates = []
    for member, info, load, own in placeable:
        waiting = load.queued + own.count
        prompt_tokens = tokens
        if matches and (waiting < load.free_slots or not has_free_slot):
            prompt_tokens = _uncached_tokens(prompt_bytes, matches.get(member.node_id, 0))
        hop_s = 0.0 if member.is_self else HOP_S
        estimate_s = first_token_s(load, own, prompt_tokens) + hop_s
        uncached_s = estimate_s if prompt_tokens == tokens else first_token_s(load, own, tokens) + hop_s
        occupancy = (load.active + waiting) / max(1, info.slots)
        cost_s = added_s(load, own, prompt_tokens_mean)
        candidates.append(_Candidate(member.node_id, estimate_s, occupancy, member.is_self, uncached_s, cost_s))
    return candidates


def _uncached_tokens(prompt_bytes: int, cached_blocks: int) -> int:
    return max(1, tokens_of(prompt_bytes) - cached_blocks * BLOCK_TOKENS)
