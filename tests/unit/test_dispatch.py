"""Opening, silent retries and honest failures, over the real router and scripted nodes."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import pytest
import trio
import trio.testing

from mesh.errors import ModelUnknown, NoCapacity, PeerUnavailable
from mesh.router import RETRY_AFTER_MIN_S, Router
from mesh.view import (
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
from nodes.attempts import Move
from nodes.dispatch import Dispatch
from nodes.dispatched_stream import PATIENCE_S, TRIES_MAX
from nodes.generation import (
    DeadlineExceeded,
    GenerateEvent,
    GenerateRequest,
    GenerationFailed,
    GenerationMoved,
    RequestInvalid,
    Sampling,
    Usage,
)
from observability.tracing import NO_TRACING, Tracer

TOKEN = GenerateEvent("a", (1,))
LAST = GenerateEvent("", (), "stop", Usage(3, 1))
HANG = 1e6
Script = Sequence[GenerateEvent | Exception | float]  # a float: seconds of silence


class ScriptedStream(trio.abc.ReceiveChannel[GenerateEvent]):
    def __init__(self, script: Script) -> None:
        self._script = list(script)
        self.is_closed = False

    async def receive(self) -> GenerateEvent:
        await trio.lowlevel.checkpoint()
        if not self._script:
            raise trio.EndOfChannel
        if isinstance(self._script[0], float):
            await trio.sleep(self._script[0])
        step = self._script.pop(0)
        while isinstance(step, float):
            step = self._script.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    async def aclose(self) -> None:
        self.is_closed = True


class SilentStream(ScriptedStream):
    async def receive(self) -> GenerateEvent:
        await trio.sleep_forever()
        raise AssertionError("unreachable")


class Nodes:
    """A mesh of scripted nodes as node "a" sees it. Each script is an error of open(), or what its stream gives.

    The first node is the soonest to answer, the next the next: their queues are 0, 1, 2 … deep."""

    def __init__(
        self,
        *,
        hedges: bool = False,
        fingerprints: Mapping[str, str] | None = None,
        tracer: Tracer = NO_TRACING,
        **scripts: Script | Exception,
    ) -> None:
        self.scripts = scripts
        self.opened: list[tuple[str, GenerateRequest]] = []
        self.streams: list[ScriptedStream] = []
        self.failed: list[str] = []
        self.moves: list[Move] = []
        self._deaths: list[tuple[float, str]] = []
        self.router = Router(random.Random(1))
        members = {}
        for queued, node_id in enumerate(scripts):
            load = NodeLoad(Readiness.READY, models={"m": ModelLoad(queued=queued * 10, decode_rate=10.0)})
            fingerprint = (fingerprints or {}).get(node_id, "f")
            profile = NodeProfile(models=(ModelInfo("m", fingerprint, 1024, 8),))
            address = Address("127.0.0.1", 7946)
            members[node_id] = MemberView(
                node_id, address, MemberStatus.ALIVE, 1, 1, load, profile, 0.0, is_self=node_id == "a"
            )
        self.view = ClusterView("a", 0.0, MappingProxyType(members))
        self.dispatch = Dispatch(
            view=self._view_now,
            router=self.router,
            local=_Node(self, "a"),
            remote=lambda member: _Node(self, member.node_id),
            peer_failed=self.failed.append,
            rng=random.Random(2),
            hedges=hedges,
            on_move=self.moves.append,
            tracer=tracer,
        )

    def set_load(self, node_id: str, load: ModelLoad) -> None:
        member = self.view.members[node_id]
        self._set(replace(member, load=NodeLoad(Readiness.READY, models={"m": load})))

    def take_down(self, node_id: str, after_s: float) -> None:
        """From so many seconds after now on the view has the node dead."""
        dead_at = trio.current_time() + after_s
        self._deaths.append((dead_at, node_id))

    def _set(self, member: MemberView) -> None:
        self.view = replace(self.view, members=MappingProxyType({**self.view.members, member.node_id: member}))

    def _view_now(self) -> ClusterView:
        for dead_at, node_id in self._deaths:
            if trio.current_time() >= dead_at:
                self._set(replace(self.view.members[node_id], status=MemberStatus.DEAD))
        return replace(self.view, witnessed=self.dispatch.witnessed)


class _Node:
    def __init__(self, nodes: Nodes, node_id: str) -> None:
        self._nodes = nodes
        self._node_id = node_id

    async def open(self, request: GenerateRequest) -> trio.abc.ReceiveChannel[GenerateEvent]:
        await trio.lowlevel.checkpoint()
        self._nodes.opened.append((self._node_id, request))
        script = self._nodes.scripts[self._node_id]
        if isinstance(script, Exception):
            raise script
        stream = ScriptedStream(script) if script else SilentStream(())
        self._nodes.streams.append(stream)
        return stream


def request(**fields: object) -> GenerateRequest:
    return GenerateRequest("req", "m", ({"role": "user", "content": "hi"},), **fields)  # type: ignore[arg-type]


async def read(nodes: Nodes) -> tuple[list[GenerateEvent], str]:
    stream = await nodes.dispatch.open(request())
    async with stream:
        return [event async for event in stream], stream.node_id


@pytest.mark.parametrize(
    "fault",
    [PeerUnavailable("gone"), NoCapacity("full", 3.0), GenerationFailed("engine"), ModelUnknown("not any more")],
    ids=lambda fault: type(fault).__name__,
)
@pytest.mark.parametrize("when", ["at-open", "before-the-first-event"])
async def test_a_fault_before_the_first_event_moves_silently_to_the_next_node(fault: Exception, when: str) -> None:
    nodes = Nodes(b=fault if when == "at-open" else [fault], c=[TOKEN, LAST], a=[])
    events, node_id = await read(nodes)
    assert events == [TOKEN, LAST]
    assert node_id == "c"
    assert nodes.failed == (["b"] if isinstance(fault, PeerUnavailable) else [])
    assert nodes.dispatch.statistics().retries == {type(fault).__name__: 1}
    # What no node had taken yet has not moved.
    assert [(move.kind, move.origin, move.target) for move in nodes.moves] == (
        [] if when == "at-open" else [("retry", "b", "c")]
    )


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (PeerUnavailable("gone"), "link"),
        (GenerationFailed("engine"), "fault"),
        (NoCapacity("full", 3.0), "refused"),
        (GenerationMoved("drains"), "drain"),
        (RequestInvalid("no room here"), "fault"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
async def test_a_fault_in_mid_stream_goes_on_at_the_next_node_with_the_ids_so_far(
    fault: Exception, reason: str
) -> None:
    nodes = Nodes(b=[TOKEN, GenerateEvent("bc", (2, 3)), fault], c=[GenerateEvent("d", (4,)), LAST], a=[])
    stream = await nodes.dispatch.open(request())
    assert "".join([event.text async for event in stream]) == "abcd"
    first, second = nodes.opened
    assert [node_id for node_id, _ in nodes.opened] == stream.path == ["b", "c"]
    assert (first[1].generated_ids, first[1].fingerprint) == ((), "")
    assert (second[1].generated_ids, second[1].fingerprint) == ((1, 2, 3), "f")
    assert first[1].noise_seed == second[1].noise_seed
    assert all(opened.is_closed for opened in nodes.streams)
    statistics = nodes.dispatch.statistics()
    assert (statistics.failovers, statistics.resumed_tokens, statistics.lost) == ({reason: 1}, 3, 0)
    assert stream.failovers == 1
    assert stream.moves == nodes.moves == [Move("failover", "b", "c", reason)]


async def test_the_wait_for_the_first_token_counts_from_the_request_over_all_nodes_tried(
    autojump_clock: trio.testing.MockClock,
) -> None:
    nodes = Nodes(b=[0.5, GenerationFailed("b failed")], c=[0.25, TOKEN, 1.0, LAST], a=[])
    stream = await nodes.dispatch.open(request())
    assert stream.first_token_s is None
    async for _ in stream:
        assert stream.first_token_s == 0.75
    assert stream.failovers == 0  # before its first token it only moved on


async def test_an_answer_generated_here_is_this_entrys_own_until_it_ends_and_counted_by_its_row_alone() -> None:
    nodes = Nodes(a=[TOKEN, LAST], b=[TOKEN, LAST])
    async with await nodes.dispatch.open(request()) as stream:
        assert stream.path == ["a"]
        ledger = nodes.router._ledgers["a", "m"]
        assert (ledger.count, ledger.open) == (0, 1)
    assert (ledger.count, ledger.open) == (0, 0)


async def test_several_nodes_may_fail_one_after_the_other() -> None:
    gone = PeerUnavailable("gone")
    nodes = Nodes(b=[TOKEN, gone], c=gone, d=[TOKEN, gone], e=[TOKEN, GenerationFailed("x")], f=[TOKEN, LAST], a=[])
    stream = await nodes.dispatch.open(request())
    assert "".join([event.text async for event in stream]) == "aaaa"
    assert stream.path == ["b", "d", "e", "f"]
    assert stream.failovers == 3


async def test_an_answer_goes_on_at_no_node_with_other_weights(autojump_clock: trio.testing.MockClock) -> None:
    nodes = Nodes(b=[TOKEN, PeerUnavailable("gone")], c=[TOKEN, LAST], fingerprints={"c": "other"})
    stream = await nodes.dispatch.open(request())
    assert await stream.receive() == TOKEN
    nodes.scripts["b"] = PeerUnavailable("gone")
    nodes.take_down("b", after_s=4.0)
    started = trio.current_time()
    with pytest.raises(GenerationFailed, match=r"b failed .* \(link\), and no other node could"):
        await stream.receive()
    assert trio.current_time() - started < PATIENCE_S
    with pytest.raises(trio.EndOfChannel):
        await stream.receive()
    assert "c" not in stream.path
    assert nodes.dispatch.statistics().lost == 1
    assert nodes.dispatch.statistics().open_streams == 0


async def test_an_answer_waits_for_the_only_node_to_begin_a_new_life(autojump_clock: trio.testing.MockClock) -> None:
    nodes = Nodes(b=[TOKEN, PeerUnavailable("gone")])
    stream = await nodes.dispatch.open(request())
    assert await stream.receive() == TOKEN
    nodes.scripts["b"] = [LAST]
    assert await stream.receive() == LAST
    assert nodes.opened[-1][1].generated_ids == (1,)


async def test_a_stream_that_ends_without_a_finish_reason_goes_on_elsewhere() -> None:
    nodes = Nodes(b=[TOKEN], c=[LAST], a=[])
    events, node_id = await read(nodes)
    assert (events, node_id) == ([TOKEN, LAST], "c")


async def test_answers_of_the_own_engines_move_to_a_peer_when_this_node_drains(
    autojump_clock: trio.testing.MockClock,
) -> None:
    nodes = Nodes(a=[TOKEN, HANG], b=[LAST])
    stream = await nodes.dispatch.open(request())
    assert await stream.receive() == TOKEN
    assert nodes.dispatch.move_local() == 1
    assert await stream.receive() == LAST
    assert stream.path == ["a", "b"]
    assert nodes.streams[0].is_closed


async def test_an_answer_stays_where_it_is_when_nobody_takes_it(autojump_clock: trio.testing.MockClock) -> None:
    nodes = Nodes(a=[TOKEN, TOKEN, LAST], b=NoCapacity("full", 1.0))
    stream = await nodes.dispatch.open(request())
    assert await stream.receive() == TOKEN
    nodes.dispatch.move_local()
    assert [event async for event in stream] == [TOKEN, LAST]
    assert stream.path == ["a"]


async def test_answers_leave_a_node_that_accepts_streams_and_makes_no_progress(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    nodes = Nodes(b=[TOKEN, HANG], c=[LAST], a=[])
    nodes.set_load("b", ModelLoad(active=1, step_count=7, step_s=0.01, decode_rate=10.0))
    await nursery.start(nodes.dispatch.run)
    stream = await nodes.dispatch.open(request())
    assert await stream.receive() == TOKEN
    started = trio.current_time()
    assert await stream.receive() == LAST
    assert 2.0 <= trio.current_time() - started <= 2.6
    assert stream.path == ["b", "c"]
    assert nodes.dispatch.witnessed == {"b"}
    assert nodes.dispatch.statistics().failovers == {"hang": 1}
    nodes.scripts["b"] = [LAST]  # the probe's
    await trio.sleep(3.0)
    assert nodes.dispatch.witnessed == frozenset()


async def test_slow_tokens_alone_are_no_hang(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    nodes = Nodes(b=[TOKEN, 20.0, LAST], a=[])
    await nursery.start(nodes.dispatch.run)
    stream = await nodes.dispatch.open(request())

    async def step() -> None:
        for count in range(100):
            nodes.set_load("b", ModelLoad(active=1, step_count=count, step_s=0.5, decode_rate=10.0))
            await trio.sleep(1.5)

    nursery.start_soon(step)
    assert [event async for event in stream] == [TOKEN, LAST]
    assert stream.path == ["b"]
    nursery.cancel_scope.cancel()


async def test_a_late_request_is_opened_on_a_second_node_and_the_first_to_answer_is_kept(
    autojump_clock: trio.testing.MockClock,
) -> None:
    nodes = Nodes(hedges=True, b=[0.1, LAST], c=[0.5, LAST], a=[])
    for _ in range(100):
        await read(nodes)
    assert {node_id for node_id, _ in nodes.opened} == {"b"}
    nodes.scripts["b"] = [9.0, LAST]
    started = trio.current_time()
    _, node_id = await read(nodes)
    assert node_id == "c"
    assert trio.current_time() - started == pytest.approx(0.6, abs=0.05)
    assert nodes.streams[-2].is_closed
    assert nodes.dispatch.statistics().hedges == {"second": 1}
    assert nodes.moves == [Move("hedge", "b", "c", "late")]


async def test_a_node_that_fails_while_its_rival_answers_is_left_out_and_probed(
    autojump_clock: trio.testing.MockClock,
) -> None:
    nodes = Nodes(hedges=True, b=[0.1, LAST], c=[0.5, TOKEN, 0.1, PeerUnavailable("gone")], a=[TOKEN, LAST])
    for _ in range(100):
        await read(nodes)
    nodes.opened.clear()
    nodes.scripts["b"] = [0.3, PeerUnavailable("gone")]
    events, node_id = await read(nodes)
    assert [name for name, _ in nodes.opened] == ["b", "c", "a"]
    assert (events[-1], node_id) == (LAST, "a")
    assert nodes.failed == ["b", "c"]


async def test_nothing_is_hedged_unless_asked_for(autojump_clock: trio.testing.MockClock) -> None:
    nodes = Nodes(b=[0.1, LAST], c=[0.1, LAST], a=[])
    for _ in range(100):
        await read(nodes)
    nodes.scripts["b"] = [9.0, LAST]
    assert (await read(nodes))[1] == "b"


async def test_the_clients_own_fault_is_not_tried_elsewhere() -> None:
    nodes = Nodes(b=RequestInvalid("too long"), c=[TOKEN, LAST], a=[])
    with pytest.raises(RequestInvalid):
        await read(nodes)
    assert len(nodes.opened) == 1


async def test_short_questions_of_one_length_are_different_clients_with_promises_of_their_own() -> None:
    nodes = Nodes(b=NoCapacity("full", 9.0))
    for text in ("hi", "ho", "hi"):
        with pytest.raises(NoCapacity):
            await nodes.dispatch.open(replace(request(), messages=({"role": "user", "content": text},)))
    assert len(nodes.router._traffic["m"].retries._by_key) == 2


@pytest.mark.parametrize(
    "other",
    [
        {"messages": ({"role": "user", "content": "ho"},)},
        {"messages": ({"role": "system", "content": "hi"},)},
        {"fairness_id": "another key"},
        {"model": "another"},
        {"tools": "[]"},
        {"prompt": "hi", "messages": ()},
        {"sampling": Sampling(max_tokens=3)},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_request_is_known_again_by_who_asks_what(other: dict[str, object]) -> None:
    again = replace(request(), request_id="of the second try", noise_seed=7, deadline_s=1.0)
    assert again.identity() == request().identity()
    assert replace(request(), **other).identity() != request().identity()  # type: ignore[arg-type]


@pytest.mark.parametrize("names", ["b", "bc", "bcdefgh"])
async def test_refusals_everywhere_are_told_with_the_time_that_the_router_promised(
    names: str, autojump_clock: trio.testing.MockClock
) -> None:
    nodes = Nodes(**dict.fromkeys(names, NoCapacity("full", 9.0)))
    for _ in range(3):
        with pytest.raises(NoCapacity) as raised:
            await read(nodes)
        promises = nodes.router._traffic["m"].retries._order
        (promise,) = [promise for promise in promises if not promise.is_over]  # one client, one promise
        assert raised.value.retry_after_s == pytest.approx(promise.told - trio.current_time())
        await trio.sleep(raised.value.retry_after_s)


async def test_an_answer_that_waits_for_a_node_is_promised_nothing(autojump_clock: trio.testing.MockClock) -> None:
    nodes = Nodes(b=[TOKEN, PeerUnavailable("gone")], c=NoCapacity("full", 9.0))
    with pytest.raises(GenerationFailed):
        await read(nodes)
    assert not nodes.router._traffic["m"].retries


async def test_nodes_that_are_broken_promise_nothing() -> None:
    with pytest.raises(NoCapacity) as raised:
        await read(nodes := Nodes(b=PeerUnavailable("gone")))
    assert raised.value.retry_after_s == RETRY_AFTER_MIN_S
    assert not nodes.router._traffic["m"].retries


BROKEN = [GenerationFailed("the logits are no numbers")]


@pytest.mark.parametrize("names", ["b", "bc"])
async def test_a_request_that_every_node_breaks_is_no_want_of_room(names: str) -> None:
    with pytest.raises(GenerationFailed, match="the logits are no numbers"):
        await read(Nodes(**dict.fromkeys(names, BROKEN)))


@pytest.mark.parametrize("other", [NoCapacity("full", 9.0), PeerUnavailable("gone"), [GenerationMoved("drains")]])
@pytest.mark.parametrize("is_first", [True, False])
async def test_beside_a_node_that_is_full_or_away_one_that_broke_the_request_is_not_the_reason(
    other: Script | Exception, is_first: bool
) -> None:
    with pytest.raises(NoCapacity):
        await read(Nodes(b=other, c=BROKEN) if is_first else Nodes(b=BROKEN, c=other))


async def test_a_request_may_come_back_to_a_node_that_loads_the_model() -> None:
    nodes = Nodes(b=BROKEN, c=[])
    nodes._set(replace(nodes.view.members["c"], load=NodeLoad(Readiness.LOADING)))
    with pytest.raises(NoCapacity):
        await read(nodes)


async def test_a_full_node_beside_one_that_refused_gives_the_routers_time() -> None:
    nodes = Nodes(b=NoCapacity("full", 9.0), c=[])
    nodes.set_load("c", ModelLoad(active=8, queued=10_000, decode_rate=10.0))
    for _ in range(2):
        with pytest.raises(NoCapacity) as raised:
            await read(nodes)
        assert raised.value.retry_after_s != 9.0
    assert nodes.router._traffic["m"].retries


async def test_tries_are_bounded() -> None:
    names = "bcdefgh"
    nodes = Nodes(**dict.fromkeys(names, PeerUnavailable("gone")), a=[TOKEN, LAST])
    with pytest.raises(GenerationFailed, match=f"{TRIES_MAX} nodes were tried"):
        await read(nodes)
    assert len(nodes.opened) == TRIES_MAX


async def test_an_unknown_model_is_told_as_such() -> None:
    nodes = Nodes(a=[TOKEN, LAST])
    with pytest.raises(ModelUnknown):
        await nodes.dispatch.open(GenerateRequest("req", "absent", ()))


async def test_only_forwarded_requests_count_a_hop() -> None:
    for executor, hops in (("a", 0), ("b", 1)):
        nodes = Nodes(**{executor: [TOKEN, LAST]}, **({} if executor == "a" else {"a": []}))
        await read(nodes)
        assert [(node_id, sent.hops) for node_id, sent in nodes.opened] == [(executor, hops)]


async def test_closing_the_stream_closes_the_nodes_stream_and_the_books() -> None:
    nodes = Nodes(b=[TOKEN, LAST], a=[])
    stream = await nodes.dispatch.open(request())
    assert nodes.dispatch.statistics().open_streams == 1
    await stream.aclose()
    assert nodes.streams[0].is_closed
    assert nodes.dispatch.statistics().open_streams == 0


async def test_a_deadline_ends_a_silent_stream(autojump_clock: trio.testing.MockClock) -> None:
    nodes = Nodes(b=[], a=[])
    stream = await nodes.dispatch.open(request(deadline_s=5.0))
    with pytest.raises(DeadlineExceeded):
        await stream.receive()
    assert nodes.streams[0].is_closed


async def test_a_read_that_is_cancelled_loses_nothing(autojump_clock: trio.testing.MockClock) -> None:
    nodes = Nodes(b=[TOKEN, LAST], a=[])
    stream = await nodes.dispatch.open(request())
    with trio.CancelScope() as scope:
        scope.cancel()
        await stream.receive()
    assert [event async for event in stream] == [TOKEN, LAST]
