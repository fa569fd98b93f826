"""The router against pictures of a cluster made by hand: no gossip, no clock."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import ModelUnknown, NoCapacity
from mesh.own_dispatches import OWN_DISPATCHES_MAX, REPORT_DELAY_S
from mesh.router import (
    LEDGERS_MAX,
    RETRY_AFTER_MAX_S,
    RETRY_AFTER_MIN_S,
    Router,
    RouteRequest,
)
from mesh.view import (
    EMBEDDING,
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

SLOTS = 8
REQUEST = RouteRequest("demo", prompt_bytes=400)
IDLE = ModelLoad(free_slots=SLOTS, prefill_rate=1000.0, decode_rate=200.0)
BUSY = replace(IDLE, active=SLOTS, free_slots=0)


def member(
    node_id: str,
    load: ModelLoad | None = IDLE,
    *,
    status: MemberStatus = MemberStatus.ALIVE,
    readiness: Readiness = Readiness.READY,
    model: str | None = "demo",
    load_version: int = 1,
    load_age_s: float = 0.5,
    queue_limit: int = 512,
    is_self: bool = False,
) -> MemberView:
    models = (ModelInfo(model, "f", 2048, SLOTS, queue_limit),) if model else ()
    return MemberView(
        node_id=node_id,
        address=Address("127.0.0.1", 7946),
        status=status,
        generation=1,
        version=load_version,
        load=NodeLoad(readiness=readiness, models={model: load} if model and load else {}),
        profile=NodeProfile(models=models),
        age_s=0.1,
        is_self=is_self,
        load_age_s=load_age_s,
        load_version=load_version,
    )


def view_of(*members: MemberView, self_id: str | None = None) -> ClusterView:
    return ClusterView(self_id or members[0].node_id, 0.0, {m.node_id: m for m in members})


def rank(*members: MemberView, request: RouteRequest = REQUEST, seed: int = 0, now: float = 0.0) -> list[str]:
    return Router(random.Random(seed)).rank(view_of(*members), request, now)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        pytest.param(IDLE, BUSY, id="a free slot beats none"),
        pytest.param(IDLE, replace(IDLE, queued_tokens=2000), id="an empty prefill queue beats a long one"),
        pytest.param(IDLE, replace(IDLE, prefill_rate=100.0), id="fast prefill beats slow"),
        pytest.param(
            IDLE, replace(IDLE, active=7, free_slots=1, decode_rate=20.0), id="prefill between long steps waits"
        ),
        pytest.param(BUSY, replace(BUSY, queued=3), id="a shorter queue beats a longer one"),
        pytest.param(replace(BUSY, decode_rate=400.0), BUSY, id="slots that free sooner beat slots that free later"),
        pytest.param(
            replace(IDLE, prefill_rate=900.0), replace(IDLE, prefill_rate=0.0), id="unmeasured counts as slow"
        ),
        pytest.param(None, BUSY, id="a model not in the report yet counts as idle"),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_the_node_with_the_sooner_first_token_is_first(better: ModelLoad | None, worse: ModelLoad, seed: int) -> None:
    assert rank(member("worse", worse), member("better", better), seed=seed) == ["better", "worse"]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(member("other", status=MemberStatus.SUSPECT), id="suspect"),
        pytest.param(member("other", status=MemberStatus.DEAD), id="dead"),
        pytest.param(member("other", status=MemberStatus.LEFT), id="left"),
        pytest.param(member("other", readiness=Readiness.LOADING), id="loading"),
        pytest.param(member("other", readiness=Readiness.DRAINING), id="draining"),
        pytest.param(member("other", readiness=Readiness.FAILED), id="failed"),
        pytest.param(member("other", load_age_s=10.0), id="with a stale report"),
        pytest.param(member("other", model="another"), id="with another model"),
        pytest.param(member("other", model=None), id="without models"),
        pytest.param(member("other", replace(BUSY, queued=4), queue_limit=4), id="with a full queue"),
    ],
)
def test_a_node_that_should_not_be_chosen_never_is(other: MemberView) -> None:
    assert rank(member("me", replace(BUSY, queued=300), is_self=True), other) == ["me"]


def test_an_excluded_node_is_never_chosen() -> None:
    request = replace(REQUEST, exclude=frozenset({"a"}))
    assert rank(member("a"), member("b", BUSY), request=request) == ["b"]


def test_a_model_that_nobody_has_is_unknown_and_the_error_does_not_repeat_a_long_name() -> None:
    with pytest.raises(ModelUnknown) as raised:
        rank(member("a"), member("b", model=None), request=RouteRequest("x" * 10_000, 1))
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize(
    ("members", "exclude", "retry_after_s"),
    [
        pytest.param([member("a", status=MemberStatus.DEAD)], (), 5.0, id="only a dead node has the model"),
        pytest.param([member("a", readiness=Readiness.LOADING)], (), 5.0, id="the only node is loading"),
        pytest.param([member("a")], ("a",), RETRY_AFTER_MIN_S, id="the only node has failed it"),
        pytest.param(
            [member("a", replace(BUSY, queued=8, decode_rate=20.0), queue_limit=8)],
            (),
            256 / 20 + 100 / 1000,
            id="a full queue: one answer's share of the batch, and a prompt like its own",
        ),
        pytest.param(
            [member(n, replace(BUSY, queued=8, decode_rate=20.0), queue_limit=8) for n in "ab"],
            (),
            256 / 20 + 100 / 1000,
            id="two full queues: twice as often, for two entries",
        ),
        pytest.param(
            [member("a", replace(BUSY, queued=8, decode_rate=1.0), queue_limit=8)],
            (),
            RETRY_AFTER_MAX_S,
            id="a slow node: not longer than the maximum",
        ),
    ],
)
def test_no_capacity_says_when_to_come_back(
    members: list[MemberView], exclude: tuple[str, ...], retry_after_s: float
) -> None:
    with pytest.raises(NoCapacity) as raised:
        rank(*members, request=replace(REQUEST, exclude=frozenset(exclude)))
    assert raised.value.retry_after_s == pytest.approx(retry_after_s)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("prompt_bytes", [8, 400, 8000])
@pytest.mark.parametrize("prefill_rate", [0.0, 500.0, 50_000.0])
def test_a_burst_on_a_picture_that_does_not_change_fills_equal_nodes_evenly(
    seed: int, prompt_bytes: int, prefill_rate: float
) -> None:
    load = replace(IDLE, prefill_rate=prefill_rate)
    view = view_of(member("a", load, is_self=True), member("b", load), member("c", load))
    router = Router(random.Random(seed))
    placed: Counter[str] = Counter()
    for number in range(24):
        node_id = router.rank(view, RouteRequest("demo", prompt_bytes), now=number / 1000)[0]
        router.dispatched(node_id, "demo", prompt_bytes, view.members[node_id].load_version)
        placed[node_id] += 1
    assert max(placed.values()) <= SLOTS
    assert min(placed.values()) >= SLOTS


@pytest.mark.parametrize("seed", range(10))
def test_three_entries_with_old_pictures_share_three_nodes(seed: int) -> None:
    """Each entry knows its own dispatches alone, and no report comes in between."""
    names = ("a", "b", "c")
    placed: Counter[str] = Counter()
    routers = [Router(random.Random(seed * 10 + i)) for i in range(3)]
    for number in range(18):
        entry = number % 3
        members = [member(name, is_self=name == names[entry]) for name in names]
        node_id = routers[entry].rank(view_of(*members, self_id=names[entry]), REQUEST, 0.0)[0]
        routers[entry].dispatched(node_id, "demo", REQUEST.prompt_bytes, 1)
        placed[node_id] += 1
    assert max(placed.values()) <= SLOTS


def test_near_ties_among_peers_are_broken_at_random() -> None:
    first = Counter(rank(member("b"), member("c"), member("d"), seed=seed)[0] for seed in range(300))
    assert set(first) == {"b", "c", "d"}
    assert min(first.values()) > 50


def test_the_local_node_wins_a_near_tie_unless_another_is_less_occupied() -> None:
    for seed in range(30):
        assert rank(member("me", is_self=True), member("b"), member("c"), seed=seed)[0] == "me"
        busier = member("me", ModelLoad(active=1, free_slots=SLOTS - 1), is_self=True)
        assert rank(busier, member("b"), member("c"), seed=seed)[0] != "me"


def test_a_report_that_contains_a_dispatch_replaces_it() -> None:
    router = Router(random.Random(0))
    full = view_of(member("a", load_version=1), member("b", BUSY, load_version=1))
    for _ in range(SLOTS + 3):
        router.rank(full, REQUEST, 0.0)
        router.dispatched("a", "demo", REQUEST.prompt_bytes, 1)
    assert router.rank(full, REQUEST, 10.0)[0] == "b", "however old, it counts until a report comes"
    fresh = view_of(member("a", load_age_s=0.5), member("b", BUSY))
    early = replace(fresh, now=0.5 + REPORT_DELAY_S / 2)
    assert router.rank(early, REQUEST, early.now)[0] == "b", "the report may have been written before"
    late = replace(fresh, now=0.51 + REPORT_DELAY_S)
    assert router.rank(late, REQUEST, late.now)[0] == "a"


def test_a_finished_dispatch_counts_no_more_however_often_it_finishes() -> None:
    router = Router(random.Random(0))
    view = view_of(member("a"), member("b", replace(IDLE, queued_tokens=600)))
    assert router.rank(view, REQUEST, 0.0)[0] == "a"
    handles = [router.dispatched("a", "demo", REQUEST.prompt_bytes, 1) for _ in range(SLOTS)]
    assert router.rank(view, REQUEST, 0.0)[0] == "b"
    for handle in handles * 2:
        router.finished(handle)
    assert router.rank(view, REQUEST, 0.0)[0] == "a"
    router.dispatched("a", "demo", 40_000, 1)
    assert router.rank(view, REQUEST, 0.0)[0] == "b"


def test_own_dispatches_fill_a_queue_before_its_report_says_so() -> None:
    router = Router(random.Random(0))
    view = view_of(member("a", queue_limit=2))
    for _ in range(SLOTS + 2):
        assert router.rank(view, REQUEST, 0.0) == ["a"]
        router.dispatched("a", "demo", REQUEST.prompt_bytes, 1)
    with pytest.raises(NoCapacity):
        router.rank(view, REQUEST, 0.0)


def test_an_answer_that_another_node_has_begun_may_go_where_the_queue_is_full() -> None:
    full = member("a", replace(BUSY, queued=5), queue_limit=5)
    with pytest.raises(NoCapacity):
        rank(full)
    resumed = replace(REQUEST, is_resumed=True)
    assert rank(full, request=resumed) == ["a"]
    assert rank(full, member("b", BUSY), request=resumed) == ["b", "a"]


def test_what_is_remembered_is_bounded() -> None:
    router = Router(random.Random(0))
    for _ in range(OWN_DISPATCHES_MAX + 10):
        router.dispatched("a", "demo", 4, 1)
    for number in range(LEDGERS_MAX + 10):
        router.dispatched(f"node-{number}", "demo", 4, 1)
    assert len(router._ledgers) == LEDGERS_MAX
    router = Router(random.Random(0))
    for _ in range(OWN_DISPATCHES_MAX + 10):
        router.dispatched("a", "demo", 4, 1)
    assert router._ledgers["a", "demo"].count == len(router._ledgers["a", "demo"].entries) == OWN_DISPATCHES_MAX


loads = st.builds(
    ModelLoad,
    active=st.integers(0, 64),
    queued=st.integers(0, 600),
    free_slots=st.integers(0, 64),
    prefill_rate=st.floats(),
    decode_rate=st.floats(),
    queued_tokens=st.integers(0, 10**7),
)


@given(st.lists(loads, min_size=1, max_size=8), st.integers(0, 10**7), st.integers(0, 2**32))
def test_every_node_that_may_serve_is_ranked_exactly_once(loads: list[ModelLoad], prompt_bytes: int, seed: int) -> None:
    members = [member(f"node-{i}", load) for i, load in enumerate(loads)]
    expected = sorted(m.node_id for m, load in zip(members, loads, strict=True) if load.queued - load.free_slots < 512)
    request = RouteRequest("demo", prompt_bytes)
    if expected:
        assert sorted(rank(*members, request=request, seed=seed)) == expected
        return
    with pytest.raises(NoCapacity) as raised:
        rank(*members, request=request, seed=seed)
    assert RETRY_AFTER_MIN_S <= raised.value.retry_after_s <= RETRY_AFTER_MAX_S


def test_the_more_other_entries_send_between_reports_the_more_nodes_are_chosen_from() -> None:
    """Three peers whose reports say that one of them is a little sooner, and is so for all entries alike."""
    measured = replace(IDLE, prompt_token_s=0.001, wait_s=0.2)
    best = replace(measured, wait_s=0.0)

    def first_choices(others_present: int) -> set[str]:
        chosen = set()
        for seed in range(40):
            router = Router(random.Random(seed))
            peers = [
                member(name, replace(load, active=others_present, free_slots=SLOTS - 1), load_age_s=1.0)
                for name, load in {"b": best, "c": measured, "d": measured}.items()
            ]
            view = view_of(member("edge", model=None, is_self=True), *peers)
            router.rank(view, REQUEST, 0.0)
            own = [router.dispatched(name, "demo", REQUEST.prompt_bytes, 1) for name in "bcd"]
            for entry in own:
                router.opened(entry)  # their reports contain them
            chosen.add(router.rank(view, REQUEST, 0.0)[0])
        return chosen

    assert first_choices(others_present=1) == {"b"}, "all there are this entry's own"
    assert first_choices(others_present=7) == {"b", "c", "d"}


def test_the_own_node_is_known_exactly_and_goes_before_peers_that_others_fill_meanwhile() -> None:
    measured = replace(IDLE, prompt_token_s=0.001, active=7, free_slots=1)
    for seed in range(20):
        router = Router(random.Random(seed))
        peers = [member(name, measured, load_age_s=1.0) for name in "bc"]
        view = view_of(member("me", replace(measured, wait_s=0.05), is_self=True), *peers)
        router.rank(view, REQUEST, 0.0)
        for name in "bc":
            router.opened(router.dispatched(name, "demo", REQUEST.prompt_bytes, 1))
        assert router.rank(view, REQUEST, 0.0)[0] == "me"


def test_a_model_of_another_kind_is_none_that_the_request_may_go_to() -> None:
    embedding = member("b")
    info = replace(embedding.profile.models[0], kind=EMBEDDING)
    embedding = replace(embedding, profile=NodeProfile(models=(info,)))
    assert rank(member("a"), embedding) == ["a"]
    assert rank(member("a"), embedding, request=replace(REQUEST, kind=EMBEDDING)) == ["b"]
    with pytest.raises(ModelUnknown):
        rank(embedding)


def test_a_node_that_makes_no_progress_is_asked_only_where_no_sound_one_could_be() -> None:
    full, stuck = member("full", replace(BUSY, queued=2), queue_limit=2), member("stuck")
    view = replace(view_of(full, stuck), witnessed=frozenset({"stuck"}))
    with pytest.raises(NoCapacity, match="1 have a full queue"):
        Router(random.Random(0)).rank(view, REQUEST, 0.0)
    assert Router(random.Random(0)).rank(view, replace(REQUEST, exclude=frozenset({"full"})), 0.0) == ["stuck"]
    assert Router(random.Random(0)).rank(replace(view, witnessed=frozenset()), REQUEST, 0.0) == ["stuck"]
