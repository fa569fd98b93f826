"""Who computes embeddings, and who does when that one fails; over the real router and scripted nodes."""

from __future__ import annotations

import random
from types import MappingProxyType

import numpy as np
import pytest
import trio
import trio.testing

from mesh.errors import MeshError, ModelUnknown, NoCapacity, PeerUnavailable
from mesh.router import Router
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
from nodes.attempts import AttemptCounts
from nodes.dispatched_stream import DEADLINE_GRACE_S
from nodes.embedding import Embeddings, EmbedRequest
from nodes.embedding_dispatch import PIECE_INPUTS_MAX, PIECES_AT_ONCE, EmbeddingDispatch
from nodes.generation import DeadlineExceeded, GenerationError, GenerationFailed, RequestInvalid
from observability.tracing import NO_TRACING, Tracer

HANG = 1e6
Script = MeshError | GenerationError | float | None  # an error, or seconds until there is an answer


class Nodes:
    """A mesh of scripted nodes as node "a" sees it; the first is the soonest. Vectors are (index of the input,)."""

    def __init__(
        self, fingerprints: dict[str, str] | None = None, *, tracer: Tracer = NO_TRACING, **scripts: Script
    ) -> None:
        self.scripts = scripts
        self.asked: list[tuple[str, EmbedRequest]] = []
        self.failed: list[str] = []
        self.counts = AttemptCounts()
        self.at_once = self.most_at_once = 0
        self.fingerprints = dict.fromkeys(scripts, "f") | (fingerprints or {})
        members = {}
        for queued, node_id in enumerate(scripts):
            load = NodeLoad(Readiness.READY, models={"m": ModelLoad(queued=queued * 10, decode_rate=10.0)})
            info = ModelInfo("m", self.fingerprints[node_id], 64, 8, kind=EMBEDDING)
            members[node_id] = MemberView(
                node_id,
                Address("127.0.0.1", 7946),
                MemberStatus.ALIVE,
                1,
                1,
                load,
                NodeProfile(models=(info,)),
                0.0,
                is_self=node_id == "a",
            )
        view = ClusterView("a", 0.0, MappingProxyType(members))
        self.dispatch = EmbeddingDispatch(
            view=lambda: view,
            router=Router(random.Random(1)),
            local=_Node(self, "a"),
            remote=lambda member: _Node(self, member.node_id),
            peer_failed=self.failed.append,
            counts=self.counts,
            tracer=tracer,
        )


class _Node:
    def __init__(self, nodes: Nodes, node_id: str) -> None:
        self._nodes = nodes
        self._node_id = node_id

    async def embed(self, request: EmbedRequest) -> Embeddings:
        nodes = self._nodes
        nodes.asked.append((self._node_id, request))
        nodes.at_once += 1
        nodes.most_at_once = max(nodes.most_at_once, nodes.at_once)
        try:
            script = nodes.scripts[self._node_id]
            await trio.sleep(script if isinstance(script, float) else 0)
            if isinstance(script, Exception):
                raise script
        finally:
            nodes.at_once -= 1
        first = request.first_index
        vectors = np.arange(first, first + len(request.inputs), dtype=np.float32)[:, None]
        return Embeddings(vectors, 2 * len(request.inputs), nodes.fingerprints[self._node_id])


def request(inputs: int = 1, deadline_s: float = 600.0) -> EmbedRequest:
    return EmbedRequest("r", "m", ("text",) * inputs, deadline_s=deadline_s)


async def test_the_best_node_is_asked_and_a_forwarded_request_has_hopped() -> None:
    nodes = Nodes(b=None, a=None)
    answer = await nodes.dispatch.embed(request())
    assert (answer.node_ids, answer.prompt_tokens, answer.vectors.tolist()) == (("b",), 2, [[0.0]])
    assert nodes.asked[0][1].hops == 1
    assert (nodes.counts.forwards, nodes.failed) == (1, [])
    local = Nodes(a=None, b=None)
    await local.dispatch.embed(request())
    assert (local.asked[0][1].hops, local.counts.forwards) == (0, 0)


@pytest.mark.parametrize(
    "error", [PeerUnavailable("gone"), GenerationFailed("broken"), NoCapacity("full", 3.0), ModelUnknown("what?")]
)
async def test_the_next_node_is_asked_when_one_fails(error: MeshError | GenerationError) -> None:
    nodes = Nodes(b=error, c=None)
    answer = await nodes.dispatch.embed(request())
    assert answer.node_ids == ("c",)
    assert nodes.failed == (["b"] if isinstance(error, PeerUnavailable) else [])
    assert dict(nodes.counts.retries) == {type(error).__name__: 1}


@pytest.mark.parametrize("error", [RequestInvalid("too long", param="input"), DeadlineExceeded("late")])
async def test_no_other_node_is_asked_where_it_would_do_no_better(error: GenerationError) -> None:
    nodes = Nodes(b=error, c=None)
    with pytest.raises(type(error)):
        await nodes.dispatch.embed(request())
    assert [node_id for node_id, _ in nodes.asked] == ["b"]


async def test_inputs_that_every_node_breaks_are_no_want_of_room() -> None:
    with pytest.raises(GenerationFailed, match="broken"):
        await Nodes(b=GenerationFailed("broken")).dispatch.embed(request())


async def test_a_node_that_was_full_says_when_to_come_back() -> None:
    nodes = Nodes(b=NoCapacity("full", 3.0), c=GenerationFailed("broken"))
    with pytest.raises(NoCapacity, match="full"):
        await nodes.dispatch.embed(request())


async def test_four_nodes_are_tried_at_most() -> None:
    nodes = Nodes(**{node_id: PeerUnavailable("gone") for node_id in "bcdefg"})
    with pytest.raises(GenerationFailed, match="4 nodes were tried"):
        await nodes.dispatch.embed(request())
    assert len(nodes.asked) == 4


async def test_inputs_that_broke_two_engines_are_given_to_no_third() -> None:
    nodes = Nodes(**{node_id: GenerationFailed("broken") for node_id in "bcdefg"})
    with pytest.raises(GenerationFailed, match="broken"):
        await nodes.dispatch.embed(request())
    assert len(nodes.asked) == 2
    late = Nodes(b=PeerUnavailable("gone"), c=GenerationFailed("broken"), d=PeerUnavailable("gone"), e=None)
    assert (await late.dispatch.embed(request())).node_ids == ("e",)


async def test_a_model_that_nobody_has_is_unknown() -> None:
    with pytest.raises(ModelUnknown):
        await Nodes(b=None).dispatch.embed(EmbedRequest("r", "other", ("text",)))


async def test_a_peer_that_says_nothing_is_given_up_at_the_deadline(autojump_clock: trio.testing.MockClock) -> None:
    started = trio.current_time()
    with pytest.raises(DeadlineExceeded):
        await Nodes(b=HANG).dispatch.embed(request(deadline_s=10.0))
    assert trio.current_time() - started == pytest.approx(10.0 + DEADLINE_GRACE_S)


async def test_many_inputs_go_in_pieces_and_come_back_in_order(autojump_clock: trio.testing.MockClock) -> None:
    nodes = Nodes(b=1.0)
    count = 10 * PIECE_INPUTS_MAX + 1
    answer = await nodes.dispatch.embed(request(count))
    assert answer.vectors[:, 0].tolist() == list(range(count))
    assert answer.prompt_tokens == 2 * count
    assert len(nodes.asked) == 11
    assert answer.node_ids == ("b",)
    assert 1 < nodes.most_at_once <= PIECES_AT_ONCE


async def test_all_pieces_are_of_one_model(autojump_clock: trio.testing.MockClock) -> None:
    nodes = Nodes({"b": "f1", "c": "f2", "d": "f1"}, b=1.0, c=0.0, d=1.0)
    answer = await nodes.dispatch.embed(request(8 * PIECE_INPUTS_MAX))
    assert set(answer.node_ids) <= {"b", "d"}
    assert {each.fingerprint for _, each in nodes.asked[1:]} == {"f1"}


async def test_one_piece_that_nobody_can_compute_fails_the_request(autojump_clock: trio.testing.MockClock) -> None:
    nodes = Nodes(b=1.0)

    async def break_later() -> None:
        await trio.sleep(1.5)
        nodes.scripts["b"] = GenerationFailed("broken")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(break_later)
        with pytest.raises(GenerationFailed, match="broken"):
            await nodes.dispatch.embed(request(12 * PIECE_INPUTS_MAX))
    assert nodes.at_once == 0


async def test_a_client_that_leaves_ends_all_pieces(autojump_clock: trio.testing.MockClock) -> None:
    nodes = Nodes(b=5.0)
    with trio.move_on_after(7.0):
        await nodes.dispatch.embed(request(5 * PIECE_INPUTS_MAX))
    assert len(nodes.asked) == 5
    assert nodes.at_once == 0
