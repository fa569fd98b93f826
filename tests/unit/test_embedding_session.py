"""The session of an embedding model against the graph's own hidden states, and one batch against another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.quantization import quantize_dynamic

from nodes.engine.embedding_folder import read_embedding_folder
from nodes.engine.embedding_session import ROWS_MAX, EmbeddingSession, load_embedding_session
from nodes.engine.model_folder import ModelFolderInvalid
from nodes.engine.pooling import normalized, pool, shortened
from nodes.model_tools.random_encoder import write_random_encoder

VOCABULARY, CONTEXT = 512, 64
TOLERANCE = 1e-5


def load(path: Path, **options: Any) -> EmbeddingSession:
    folder = read_embedding_folder(write_random_encoder(path, **options))
    return load_embedding_session(folder, threads=1, spinning=False, provider="cpu")


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingSession:
    return load(tmp_path_factory.mktemp("encoder"))


def hidden_states(path: Path, ids: list[int]) -> npt.NDArray[np.float64]:
    """[tokens, dimensions] of one input alone, by the graph itself."""
    graph = onnxruntime.InferenceSession(str(path / "model.onnx"), providers=["CPUExecutionProvider"])
    row = np.array([ids])
    feeds = {"input_ids": row, "attention_mask": np.ones_like(row), "token_type_ids": np.zeros_like(row)}
    return np.asarray(graph.run(["last_hidden_state"], feeds)[0][0], np.float64)


@pytest.mark.parametrize(
    ("pooling", "of_states"),
    [
        ("mean_tokens", lambda states: states.sum(axis=0) / len(states)),
        ("cls_token", lambda states: states[0]),
        ("max_tokens", lambda states: states.max(axis=0)),
    ],
)
@pytest.mark.parametrize("is_normalized", [True, False])
def test_vectors_are_the_pooled_hidden_states(
    tmp_path: Path, pooling: str, of_states: Any, is_normalized: bool
) -> None:
    session = load(tmp_path, pooling=pooling, is_normalized=is_normalized)
    inputs = [[0, 7, 300, 41, 2], [0, 2], [0, *range(100, 140), 2]]
    vectors = session.embed([np.array(ids) for ids in inputs])
    assert vectors.dtype == np.float32
    for vector, ids in zip(vectors, inputs, strict=True):
        expected = of_states(hidden_states(tmp_path, ids))
        if is_normalized:
            expected = expected / np.sqrt((expected**2).sum())
        assert np.allclose(vector, expected, atol=TOLERANCE)


def test_a_graph_that_pools_is_taken_at_its_word(tmp_path: Path) -> None:
    of_graph = load(tmp_path / "a", is_pooled=True)
    of_states = load(tmp_path / "b")
    inputs = [np.array([0, 9, 8, 2]), np.array([0, 2])]
    assert np.allclose(of_graph.embed(inputs), of_states.embed(inputs), atol=TOLERANCE)


def test_position_ids_count_from_the_first_token(tmp_path: Path) -> None:
    given_positions = load(tmp_path / "a", inputs=("input_ids", "attention_mask", "position_ids"))
    own_positions = load(tmp_path / "b", inputs=("input_ids", "attention_mask"))
    inputs = [np.array([0, 9, 8, 2]), np.array([0, 2])]
    assert np.allclose(given_positions.embed(inputs), own_positions.embed(inputs), atol=TOLERANCE)


inputs_of_ids = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=CONTEXT)


@settings(max_examples=40, deadline=None)
@given(st.lists(inputs_of_ids, min_size=1, max_size=6))
def test_a_vector_is_the_same_whatever_else_is_in_the_batch(session: EmbeddingSession, batch: list[list[int]]) -> None:
    arrays = [np.array(ids) for ids in batch]
    together = session.embed(arrays)
    alone = np.concatenate([session.embed([ids]) for ids in arrays])
    assert np.abs(together - alone).max() <= TOLERANCE


def test_different_texts_have_different_vectors(session: EmbeddingSession) -> None:
    vectors = session.embed([np.array([0, 9, 8, 2]), np.array([0, 8, 9, 2]), np.array([0, 9, 8, 7, 2])])
    similarity = vectors @ vectors.T
    assert (similarity[np.triu_indices(3, 1)] < 0.999).all()


def test_a_graph_in_float32_is_given_batches(session: EmbeddingSession) -> None:
    assert (session.rows_max, session.dimensions, session.device) == (ROWS_MAX, 32, "cpu")


class LeakyGraph:
    """Gives each row the mean of all ids of the batch, as a scale of the whole batch would."""

    def run(self, outputs: list[str], feeds: dict[str, npt.NDArray[np.int64]]) -> list[npt.NDArray[np.float32]]:
        ids = feeds["input_ids"]
        states = np.ones((*ids.shape, 4), np.float32)
        states[..., 0] = ids.mean()
        return [states]


def test_a_graph_whose_rows_depend_on_each_other_is_given_them_one_by_one(tmp_path: Path) -> None:
    folder = read_embedding_folder(write_random_encoder(tmp_path))
    assert EmbeddingSession(LeakyGraph(), folder, "cpu").rows_max == 1


def test_a_graph_quantised_to_int8_by_one_scale_a_batch_is_served_one_input_at_a_time(tmp_path: Path) -> None:
    write_random_encoder(tmp_path)
    (tmp_path / "onnx").mkdir()
    quantize_dynamic(str(tmp_path / "model.onnx"), str(tmp_path / "onnx" / "model_int8.onnx"))
    folder = read_embedding_folder(tmp_path, "int8")
    quantised = load_embedding_session(folder, threads=1, provider="cpu")
    exact = load_embedding_session(read_embedding_folder(tmp_path), threads=1, provider="cpu")
    assert (folder.precision.kind, quantised.rows_max) == ("int8", 1)
    ids = [np.array([0, 9, 8, 2])]
    assert (quantised.embed(ids) * exact.embed(ids)).sum() > 0.9


def test_a_graph_that_cannot_run_is_refused_at_load(tmp_path: Path) -> None:
    folder = read_embedding_folder(write_random_encoder(tmp_path))
    content = (tmp_path / "model.onnx").read_bytes().replace(b"LayerNormalization", b"LayerNormalizatiom")
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ModelFolderInvalid, match=r"model\.onnx cannot be loaded"):
        load_embedding_session(folder, provider="cpu")


def test_a_memory_limit_below_the_weights_is_refused(tmp_path: Path) -> None:
    folder = read_embedding_folder(write_random_encoder(tmp_path))
    with pytest.raises(ModelFolderInvalid, match="does not fit into memory"):
        load_embedding_session(folder, provider="cpu", memory_limit_bytes=1024)


def test_padded_rows_have_no_part_even_where_the_graph_leaves_nan_in_them() -> None:
    hidden = np.array([[[1.0, -2.0], [3.0, -4.0], [np.nan, np.nan]]], np.float32)
    mask = np.array([[1, 1, 0]])
    assert pool(hidden, mask, "mean").tolist() == [[2.0, -3.0]]
    assert pool(hidden, mask, "max").tolist() == [[3.0, -2.0]]
    assert pool(hidden.astype(np.float16), mask, "cls").dtype == np.float32


def test_a_shortened_vector_has_length_1_and_one_of_zeros_stays_zero() -> None:
    vectors = np.array([[3.0, 4.0, 12.0], [0.0, 0.0, 1.0]], np.float32)
    assert np.allclose(shortened(vectors, 2), [[0.6, 0.8], [0.0, 0.0]])
    assert np.allclose(np.linalg.norm(normalized(vectors), axis=1), 1)
