"""Laws of the router over any picture of a cluster, however unlikely."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mesh.prefix_digests
import mesh.router
from mesh.errors import ModelUnknown, NoCapacity
from mesh.own_dispatches import OwnDispatch
from mesh.prefix_digests import encode_digest
from mesh.router import RETRY_AFTER_MAX_S, RETRY_AFTER_MIN_S, Router, RouteRequest
from mesh.view import (
    STALE_PUBLISH_INTERVALS,
    Address,
    ClusterView,
    MemberStatus,
    MemberView,
    ModelInfo,
    ModelLoad,
    NodeLoad,
    NodeProfile,
    Readiness,
)

NAMES = [f"n{number}" for number in range(6)]
BLOCKS = st.lists(st.integers(0, 2**64 - 1), max_size=12).map(tuple)

loads = st.builds(
    ModelLoad,
    active=st.integers(0, 64),
    queued=st.integers(0, 20),
    free_slots=st.integers(0, 8),
    prefill_rate=st.floats(),
    decode_rate=st.floats(),
    queued_tokens=st.integers(0, 10**7),
    wait_s=st.floats(0, 1e6),
    prompt_token_s=st.floats(0, 10),
    answer_tokens=st.floats(0, 1e6),
)
requests = st.builds(
    RouteRequest,
    model=st.sampled_from(["demo", "other", "nobody's"]),
    prompt_bytes=st.integers(0, 10**7),
    exclude=st.frozensets(st.sampled_from(NAMES)),
    blocks=BLOCKS,
    fingerprint=st.sampled_from(["", "f", "g"]),
)


@st.composite
def members(draw: st.DrawFn, name: str, *, is_self: bool) -> MemberView:
    models = draw(st.lists(st.sampled_from(["demo", "other"]), unique=True, max_size=2))
    infos = tuple(
        ModelInfo(model, draw(st.sampled_from(["f", "g"])), 2048, 8, draw(st.integers(0, 12))) for model in models
    )
    reported = {model: draw(loads) for model in models if draw(st.booleans())}
    return MemberView(
        node_id=name,
        address=Address("127.0.0.1", 7946),
        status=draw(st.sampled_from(MemberStatus)),
        generation=draw(st.integers(1, 3)),
        version=1,
        load=NodeLoad(readiness=draw(st.sampled_from(Readiness)), models=reported),
        profile=NodeProfile(models=infos),
        age_s=0.1,
        is_self=is_self,
        load_age_s=draw(st.sampled_from([0.0, 0.5, 2.9, 3.1, 60.0])),
        load_version=1,
        bulk=draw(st.one_of(st.binary(max_size=40), BLOCKS.map(lambda blocks: encode_digest({"demo": [blocks]})))),
        bulk_version=draw(st.integers(0, 3)),
    )


@st.composite
def views(draw: st.DrawFn) -> ClusterView:
    names = NAMES[: draw(st.integers(1, len(NAMES)))]
    found = {name: draw(members(name, is_self=name == names[0])) for name in names}
    return ClusterView(names[0], 100.0, found, witnessed=draw(st.frozensets(st.sampled_from(NAMES), max_size=3)))


def may_serve(view: ClusterView, member: MemberView, request: RouteRequest, *, is_full_too: bool = False) -> bool:
    """What the router promises of a node by itself, in other words than its own."""
    info = member.model(request.model)
    if info is None or member.node_id in request.exclude or request.fingerprint not in ("", info.fingerprint):
        return False
    is_fresh = member.is_self or member.load_age_s <= STALE_PUBLISH_INTERVALS * view.publish_interval_s
    is_up = member.status is MemberStatus.ALIVE and member.load.readiness is Readiness.READY
    load = member.load.models.get(request.model)
    has_room = load.queued < info.queue_limit + load.free_slots if load else info.queue_limit + info.slots > 0
    return is_fresh and is_up and (has_room or is_full_too)


@given(views(), requests, st.lists(st.sampled_from(NAMES), max_size=30), st.integers(0, 2**32))
def test_the_ranking_is_a_permutation_of_the_nodes_that_may_serve_witnessed_ones_only_alone(
    view: ClusterView, request: RouteRequest, sent: list[str], seed: int
) -> None:
    able = {name for name, member in view.members.items() if may_serve(view, member, request, is_full_too=True)}
    considered = able if able <= view.witnessed else able - view.witnessed
    eligible = {name for name in considered if may_serve(view, view.members[name], request)}
    router = Router(random.Random(seed))
    if not any(member.model(request.model) for member in view.members.values()):
        with pytest.raises(ModelUnknown):
            router.rank(view, request, view.now)
        return
    if not eligible:
        with pytest.raises(NoCapacity) as raised:
            router.rank(view, request, view.now)
        assert RETRY_AFTER_MIN_S <= raised.value.retry_after_s <= RETRY_AFTER_MAX_S
        return
    router.rank(view, request, view.now)
    for name in sent:  # so that other entries are supposed to send as much
        router.opened(router.dispatched(name, request.model, request.prompt_bytes, 1))
    ranked = router.rank(view, request, view.now)
    assert len(ranked) == len(eligible)
    assert set(ranked) == eligible


@given(views(), requests, st.integers(0, 2**32))
def test_a_refusal_at_any_time_tells_a_bounded_time(view: ClusterView, request: RouteRequest, seed: int) -> None:
    router = Router(random.Random(seed))
    for step in range(20):
        retry_after_s = router.refused(view, request, view.now + step * 0.7).retry_after_s
        assert math.isfinite(retry_after_s)
        assert RETRY_AFTER_MIN_S <= retry_after_s <= RETRY_AFTER_MAX_S


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=60).map(tuple), st.integers(0, 2**32))
def test_a_cached_beginning_does_not_move_a_node_with_a_queue_before_one_with_a_free_slot(
    blocks: tuple[int, ...], seed: int
) -> None:
    idle = ModelLoad(free_slots=8, prefill_rate=1000.0, decode_rate=200.0, prompt_token_s=0.001, answer_tokens=100.0)
    busy = replace(idle, active=8, free_slots=0, queued=3, wait_s=0.2)  # less than the prompt takes the other node
    holder = row("holder", NodeLoad(Readiness.READY, models={"demo": busy}), blocks)
    other = row("other", NodeLoad(Readiness.READY, models={"demo": idle}))
    asked = RouteRequest("demo", 256 * len(blocks), blocks=blocks)
    view = ClusterView("holder", 0.0, {"holder": holder, "other": other})
    with_cache = Router(random.Random(seed)).rank(view, asked, 0.0)
    without = Router(random.Random(seed)).rank(view, replace(asked, blocks=()), 0.0)
    assert with_cache == without


def row(name: str, load: NodeLoad, blocks: tuple[int, ...] = (), version: int = 1) -> MemberView:
    """A member that is well, with this conversation cached."""
    return MemberView(
        node_id=name,
        address=Address("127.0.0.1", 7946),
        status=MemberStatus.ALIVE,
        generation=1,
        version=version,
        load=load,
        profile=NodeProfile(models=(ModelInfo("demo", "f", 2048, 8),)),
        age_s=0.0,
        load_version=version,
        bulk=encode_digest({"demo": [blocks]}),
        bulk_version=version,
    )


steps = st.lists(
    st.one_of(
        st.tuples(st.just("dispatch"), st.integers(0, 40), BLOCKS),
        st.tuples(st.just("finish"), st.integers(0, 40), st.just(())),
        st.tuples(st.just("rank"), st.integers(0, 40), BLOCKS),
    ),
    max_size=60,
)


@given(steps, st.integers(0, 2**32))
def test_ledgers_and_digests_stay_bounded_whatever_happens(
    steps: list[tuple[str, int, tuple[int, ...]]], seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh.router, "LEDGERS_MAX", 5)
        patch.setattr(mesh.router, "MODELS_MAX", 3)
        patch.setattr(mesh.prefix_digests, "NODES_MAX", 4)
        patch.setattr(mesh.prefix_digests, "OWN_NAMES_MAX", 7)
        router = Router(random.Random(seed))
        running: list[OwnDispatch] = []
        idle = NodeLoad(Readiness.READY, models={"demo": ModelLoad(free_slots=8)})
        for version, (what, number, blocks) in enumerate(steps, 1):
            name = f"node-{number}"
            match what:
                case "dispatch":
                    running.append(router.dispatched(name, f"model-{number % 6}", 4000, 1, blocks=blocks, generation=1))
                case "finish" if running:
                    router.finished(running.pop(number % len(running)))
                case _:
                    view = ClusterView(name, 0.0, {name: row(name, idle, blocks, version)})
                    router.rank(view, RouteRequest("demo", 4000, blocks=blocks), 0.0)
            digests = router._digests
            assert len(router._ledgers) <= 5
            assert len(router._traffic) <= 3
            assert len(router._marks) <= len(running)
            assert len(digests._known) <= 4
            assert len(digests._own) <= 7
            told = sum(len(names) for known in digests._known.values() for names, _ in known.models.values())
            assert sum(len(holders) for holders in digests._holders.values()) <= told
        while running:
            router.finished(running.pop())
        assert not router._marks
        assert all(ledger.count == ledger.tokens == ledger.open == 0 for ledger in router._ledgers.values())
