"""Requests for embeddings and answers as bytes: equal after the way, refused where they are something else."""

from __future__ import annotations

import contextlib

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodes import peer_questions
from nodes.embedding import Embeddings, EmbedRequest
from nodes.embedding_codec import (
    VECTOR_BYTES,
    AnswerReader,
    decode_request,
    encode_answer,
    encode_request,
    is_embedding,
)
from nodes.generation import GenerateRequest, GenerationFailed, RequestInvalid
from nodes.generation_codec import encode_request as encode_generation
from nodes.peer_operations import encode_operation, is_operation
from observability.trace_context import TraceContext

texts = st.text(max_size=20) | st.just("\ud800")
inputs = st.lists(texts | st.lists(st.integers(0, 2**31), max_size=5).map(tuple), min_size=1, max_size=5).map(tuple)
requests = st.builds(
    EmbedRequest,
    st.text(max_size=8),
    st.text(max_size=8),
    inputs,
    st.none() | st.integers(1, 4096),
    st.integers(0, 2048),
    st.floats(0, 600),
    st.integers(0, 2),
    st.text(max_size=8),
    st.text(max_size=8),
    st.text(max_size=8),
    st.integers(1, 100),
    st.none() | st.just(TraceContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", 1, "vendor=abc")),
)


@given(requests)
def test_a_request_is_decoded_as_it_was_encoded(request: EmbedRequest) -> None:
    data = encode_request(request)
    assert is_embedding(data)
    assert not is_operation(data)
    assert not peer_questions.is_question(data)
    assert decode_request(data) == request


def test_other_requests_of_peers_are_none_for_embeddings() -> None:
    generation = GenerateRequest("r", "m", ({"role": "user", "content": "embed "},))
    assert not is_embedding(encode_generation(generation))
    assert not is_embedding(encode_operation("embed ", {}))


@given(st.binary(max_size=60))
def test_arbitrary_bytes_are_a_request_or_refused(data: bytes) -> None:
    with contextlib.suppress(RequestInvalid, GenerationFailed):
        decode_request(b"embed " + data)


def test_a_request_of_a_later_version_is_refused_as_a_fault_of_this_node() -> None:
    with pytest.raises(GenerationFailed, match="older"):
        decode_request(b"embed " + msgpack.packb({"version": 2}))


@given(st.integers(1, 40), st.integers(1, 40))
def test_an_answer_is_put_together_as_it_was(rows: int, dimensions: int) -> None:
    vectors = np.random.default_rng(rows).standard_normal((rows, dimensions)).astype(np.float32)
    reader = AnswerReader(rows)
    for event in encode_answer(Embeddings(vectors, 17, "f1")):
        assert not reader.is_complete
        reader.feed(msgpack.unpackb(msgpack.packb(event)))
    assert reader.is_complete
    answer = reader.answer()
    assert np.array_equal(answer.vectors, vectors)
    assert (answer.vectors.dtype, answer.prompt_tokens, answer.fingerprint) == (np.float32, 17, "f1")


def test_a_large_answer_comes_in_events_that_a_link_takes() -> None:
    vectors = np.ones((128, 4096), np.float32)
    _, *parts = encode_answer(Embeddings(vectors, 1))
    assert len(parts) == 2
    assert all(isinstance(part, bytes) and len(part) <= VECTOR_BYTES for part in parts)


@pytest.mark.parametrize(
    "events",
    [
        [b"bytes first"],
        [[2, 4, 1]],
        [[3, 4, 1, "f"]],  # of another number of inputs
        [[2, 0, 1, "f"]],
        [[2, 4, -1, "f"]],
        [[2, 2**40, 1, "f"]],
        [["2", 4, 1, "f"]],
        [[2, 4, 1, "f"], "text"],
        [[2, 4, 1, "f"], b""],
        [[2, 4, 1, "f"], b"x" * 33],
    ],
)
def test_what_is_no_answer_is_refused(events: list[object]) -> None:
    reader = AnswerReader(2)
    *readable, last = events
    for event in readable:
        reader.feed(event)
    with pytest.raises(ValueError, match="embeddings"):
        reader.feed(last)
