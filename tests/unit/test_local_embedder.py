"""This node's own embeddings: texts and ids, what is refused by name, and what the observer is told."""

from __future__ import annotations

import math

import numpy as np
import pytest
import trio

from mesh.errors import ModelUnknown, NoCapacity
from nodes.embedding import EmbedRequest
from nodes.generation import DeadlineExceeded, GenerationFailed, RequestInvalid
from nodes.local_embedder import LocalEmbedder
from tests.unit.test_embedding_engine import (
    CONTEXT,
    POISON,
    FakeEmbeddingSession,
    engine_of,
    expected,
    running,
    until_steps,
)


class Told:
    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ended: list[tuple[str, str, int, int]] = []

    def started(self, model: str) -> None:
        self.begun.append(model)

    def first_token(self, model: str, seconds: float) -> None:
        raise AssertionError("embeddings have no first token")

    def finished(
        self, model: str, status: str, seconds: float, prompt_tokens: int, completion_tokens: int, *others: object
    ) -> None:
        self.ended.append((model, status, prompt_tokens, completion_tokens))


def request(*inputs: str | tuple[int, ...], **fields: object) -> EmbedRequest:
    return EmbedRequest("r", "m", inputs, **fields)  # type: ignore[arg-type]


async def test_texts_are_tokenised_and_ids_taken_as_they_are() -> None:
    session, told = FakeEmbeddingSession(), Told()
    async with running(engine_of(session), session) as engine:
        answer = await LocalEmbedder({"m": engine}, observer=told).embed(request("a node", (5, 6, 7)))
    ids = engine.model.encode("a node")
    assert answer.vectors.tolist() == [expected(ids), expected([5, 6, 7])]
    assert (answer.prompt_tokens, answer.fingerprint) == (len(ids) + 3, "toy")
    assert (told.begun, told.ended) == (["m"], [("m", "success", len(ids) + 3, 0)])


async def test_fewer_dimensions_are_the_first_at_length_1() -> None:
    session = FakeEmbeddingSession()
    async with running(engine_of(session), session) as engine:
        answer = await LocalEmbedder({"m": engine}).embed(request((3, 1), dimensions=2))
    assert np.allclose(answer.vectors, [[2 / math.hypot(2, 4), 4 / math.hypot(2, 4)]])


@pytest.mark.parametrize(
    ("asked", "param", "code", "named"),
    [
        (request("a", dimensions=4), "dimensions", None, "dimensions is 4, and the vectors of this model have 3"),
        (request("a", "x y z. " * 20, first_index=128), "input", "context_length_exceeded", "input 129: it has"),
        (request("word " * 50_000), "input", "context_length_exceeded", "input 0: it has more than"),
        (request((1,) * (CONTEXT + 1)), "input", "context_length_exceeded", "this model takes 32"),
        (request((1,), (512,)), "input", None, "input 1: token 512 is not among"),
        (request(""), "input", None, "input 0 is empty"),
    ],
)
async def test_what_the_client_did_wrong_is_named_and_not_counted(
    asked: EmbedRequest, param: str, code: str | None, named: str
) -> None:
    session, told = FakeEmbeddingSession(), Told()
    async with running(engine_of(session), session) as engine:
        with pytest.raises(RequestInvalid, match=named) as raised:
            await LocalEmbedder({"m": engine}, observer=told).embed(asked)
    assert (raised.value.param, raised.value.code) == (param, code)
    assert (told.begun, session.steps) == ([], [])


async def test_a_fault_is_ours_and_counts_as_an_error() -> None:
    session, told = FakeEmbeddingSession(), Told()
    async with running(engine_of(session), session) as engine:
        local = LocalEmbedder({"m": engine}, observer=told)
        with pytest.raises(GenerationFailed):
            await local.embed(request((POISON,)))
        with pytest.raises(ModelUnknown):
            await LocalEmbedder({}).embed(request("a"))
        with pytest.raises(GenerationFailed, match="differs"):
            await local.embed(request("a", fingerprint="another"))
    assert told.ended == [("m", "error", 0, 0)]


async def test_want_of_room_lateness_and_leaving_are_told_apart() -> None:
    session, told = FakeEmbeddingSession(), Told()
    session.hold()
    async with running(engine_of(session, queue_limit=1), session) as engine, trio.open_nursery() as nursery:
        local = LocalEmbedder({"m": engine}, observer=told)
        nursery.start_soon(local.embed, request((1,)))
        await until_steps(session, 1)
        with pytest.raises(DeadlineExceeded):
            await local.embed(request((2,), deadline_s=0.0))
        with trio.move_on_after(0):
            await local.embed(request((3,)))
        nursery.start_soon(local.embed, request((4,)))
        while not engine.statistics().queued:
            await trio.sleep(0)
        with pytest.raises(NoCapacity):
            await local.embed(request((5,)))
        session.allow(5)
    assert [status for _, status, *_ in told.ended] == ["error", "cancelled", "rejected", "success", "success"]
    assert len(told.begun) == len(told.ended)
