"""Embeddings over real links in memory: what a peer computes or refuses is what the asker gets."""

from __future__ import annotations

import numpy as np
import pytest
import trio
import trio.testing

from mesh.errors import MeshError, ModelUnknown, NoCapacity, PeerUnavailable
from mesh.forwarder import IncomingStream, StreamRefused
from nodes.embedding import Embeddings, EmbedRequest
from nodes.generation import DeadlineExceeded, GenerationError, GenerationFailed, RequestInvalid
from nodes.generation_codec import REQUEST_BYTES_MAX
from nodes.remote_embedder import EmbeddingServer, RemoteEmbedder
from tests.unit.test_peer_operations import PEER, peers

REQUEST = EmbedRequest("id", "m", ("one", (2, 3)), hops=1, fairness_id="k")


class Local:
    """Gives what it was made with, or raises it."""

    def __init__(self, result: Embeddings | Exception | None) -> None:
        self.asked: list[EmbedRequest] = []
        self.was_cancelled = False
        self._result = result

    async def embed(self, request: EmbedRequest) -> Embeddings:
        self.asked.append(request)
        if self._result is None:
            try:
                await trio.sleep_forever()
            finally:
                self.was_cancelled = True
        if isinstance(self._result, Exception):
            raise self._result
        assert self._result is not None
        await trio.lowlevel.checkpoint()
        return self._result


async def test_a_peers_vectors_arrive_as_they_were_computed(autojump_clock: trio.testing.MockClock) -> None:
    vectors = np.random.default_rng(1).standard_normal((2, 300_000)).astype(np.float32)  # several events of a link
    local = Local(Embeddings(vectors, 5, "f1"))
    async with peers(EmbeddingServer(local).serve) as forwarder:
        answer = await RemoteEmbedder(forwarder, PEER).embed(REQUEST)
    assert local.asked == [REQUEST]
    assert np.array_equal(answer.vectors, vectors)
    assert (answer.prompt_tokens, answer.fingerprint) == (5, "f1")


@pytest.mark.parametrize(
    "error",
    [
        RequestInvalid("input 1: it has 9", param="input", code="context_length_exceeded"),
        DeadlineExceeded("late"),
        GenerationFailed("broken"),
        NoCapacity("full", 2.5),
        ModelUnknown("what?"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_why_a_peer_gave_none_is_what_the_asker_reads(
    error: GenerationError | MeshError, autojump_clock: trio.testing.MockClock
) -> None:
    async with peers(EmbeddingServer(Local(error)).serve) as forwarder:
        with pytest.raises(type(error)) as raised:
            await RemoteEmbedder(forwarder, PEER).embed(REQUEST)
    assert str(raised.value) == str(error)
    for name in ("param", "code", "retry_after_s"):
        assert getattr(raised.value, name, None) == getattr(error, name, None)


async def test_a_request_that_was_forwarded_twice_is_refused(autojump_clock: trio.testing.MockClock) -> None:
    local = Local(None)
    async with peers(EmbeddingServer(local).serve) as forwarder:
        with pytest.raises(RequestInvalid, match="forwarded 2 times"):
            await RemoteEmbedder(forwarder, PEER).embed(EmbedRequest("id", "m", ("x",), hops=2))
    assert local.asked == []


async def test_an_asker_that_leaves_ends_the_work_at_the_peer(autojump_clock: trio.testing.MockClock) -> None:
    local = Local(None)
    async with peers(EmbeddingServer(local).serve) as forwarder:
        with trio.move_on_after(1.0):
            await RemoteEmbedder(forwarder, PEER).embed(REQUEST)
        await trio.testing.wait_all_tasks_blocked()
        assert local.was_cancelled
        assert forwarder.statistics().streams == 0


@pytest.mark.parametrize("events", [[], [[2, 4, 5, "f"]], [[2, 4, 5, "f"], "text"], ["no head"]])
async def test_a_peer_that_answers_otherwise_has_failed(
    events: list[object], autojump_clock: trio.testing.MockClock
) -> None:
    async def serve(stream: IncomingStream) -> None:
        for event in events:
            await stream.send(event)

    async with peers(serve) as forwarder:
        with pytest.raises(PeerUnavailable, match="node b"):
            await RemoteEmbedder(forwarder, PEER).embed(REQUEST)


async def test_a_peer_of_a_version_without_embeddings_is_no_fault_of_the_client(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def refuse(stream: IncomingStream) -> None:
        raise StreamRefused("of a later version", "what is this?")

    async with peers(refuse) as forwarder:
        with pytest.raises(GenerationFailed):
            await RemoteEmbedder(forwarder, PEER).embed(REQUEST)


async def test_inputs_too_large_for_a_link_are_a_413(autojump_clock: trio.testing.MockClock) -> None:
    async with peers(EmbeddingServer(Local(None)).serve) as forwarder:
        with pytest.raises(RequestInvalid) as raised:
            await RemoteEmbedder(forwarder, PEER).embed(EmbedRequest("id", "m", ("x" * REQUEST_BYTES_MAX,)))
    assert (raised.value.status, raised.value.param) == (413, "input")
