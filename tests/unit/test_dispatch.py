"""Opening, silent retries and honest failures, over the real router and scripted nodes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import MappingProxyType

import pytest
import trio

from mesh.errors import ModelUnknown, NoCapacity, PeerUnavailable
from mesh.router import Router
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
from nodes.dispatch import Dispatch
from nodes.dispatched_stream import TRIES_MAX
from nodes.generation import (
    DeadlineExceeded,
    GenerateEvent,
    GenerateRequest,
    GenerationFailed,
    RequestInvalid,
    Usage,
)

TOKEN = GenerateEvent("a", (1,))
LAST = GenerateEvent("", (), "stop", Usage(3, 1))
Script = Sequence[GenerateEvent | Exception]


class ScriptedStream(trio.abc.ReceiveChannel[GenerateEvent]):
    def __init__(self, script: Script) -> None:
        self._script = list(script)
        self.is_closed = False

    async def receive(self) -> GenerateEvent:
        await trio.lowlevel.checkpoint()
        if not self._script:
            raise trio.EndOfChannel
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

    def __init__(self, **scripts: Script | Exception) -> None:
        self.scripts = scripts
        self.opened: list[tuple[str, GenerateRequest]] = []
        self.streams: list[ScriptedStream] = []
        self.failed: list[str] = []
        members = {}
        for queued, node_id in enumerate(scripts):
            load = NodeLoad(Readiness.READY, models={"m": ModelLoad(queued=queued * 10, decode_rate=10.0)})
            profile = NodeProfile(models=(ModelInfo("m", "f", 1024, 8),))
            address = Address("127.0.0.1", 7946)
            members[node_id] = MemberView(
                node_id, address, MemberStatus.ALIVE, 1, 1, load, profile, 0.0, is_self=node_id == "a"
            )
        self.view = ClusterView("a", 0.0, MappingProxyType(members))
        self.dispatch = Dispatch(
            view=lambda: self.view,
            router=Router(random.Random(1)),
            local=_Node(self, "a"),
            remote=lambda member: _Node(self, member.node_id),
            peer_failed=self.failed.append,
            rng=random.Random(2),
        )


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


async def test_a_fault_in_mid_stream_is_told_and_not_hidden() -> None:
    nodes = Nodes(b=[TOKEN, PeerUnavailable("gone")], c=[TOKEN, LAST], a=[])
    stream = await nodes.dispatch.open(request())
    assert await stream.receive() == TOKEN
    with pytest.raises(GenerationFailed, match="node b failed in the middle"):
        await stream.receive()
    with pytest.raises(trio.EndOfChannel):
        await stream.receive()
    assert [node_id for node_id, _ in nodes.opened] == ["b"]


async def test_a_stream_that_ends_without_a_finish_reason_is_a_fault() -> None:
    nodes = Nodes(b=[TOKEN], a=[])
    stream = await nodes.dispatch.open(request())
    assert await stream.receive() == TOKEN
    with pytest.raises(GenerationFailed):
        await stream.receive()


async def test_the_clients_own_fault_is_not_tried_elsewhere() -> None:
    nodes = Nodes(b=RequestInvalid("too long"), c=[TOKEN, LAST], a=[])
    with pytest.raises(RequestInvalid):
        await read(nodes)
    assert len(nodes.opened) == 1


async def test_refusals_everywhere_are_told_with_the_time_to_wait() -> None:
    nodes = Nodes(b=NoCapacity("full", 9.0), a=NoCapacity("full", 4.0))
    with pytest.raises(NoCapacity) as raised:
        await read(nodes)
    assert raised.value.retry_after_s == 4.0


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
