"""What is appended to a graph's file is a part of the graph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from nodes.engine.graph import DecoderGraph, describe_graph
from nodes.engine.graph_extension import MAXIMA, SUMS, VOCABULARY_MIN, extension
from nodes.engine.logit_rows import BLOCK_LOGITS
from nodes.engine.model_loader import read_model_folder
from nodes.engine.onnx_file import read_onnx_file
from nodes.model_tools.random_llama import write_random_llama

VOCABULARY = VOCABULARY_MIN


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> DecoderGraph:
    graph = describe_graph(read_model_folder(write_random_llama(tmp_path_factory.mktemp("tiny"))))
    return replace(graph, vocabulary_size=VOCABULARY)


def graph_of_logits(opset: int, domain: str = "", *, is_first: bool = False) -> onnx.ModelProto:
    """logits = input. domain: as which the opset of ONNX's own operators is written, before that of others or after."""
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "tokens", VOCABULARY])
        for name in ("given", "logits")
    ]
    graph = helper.make_graph([helper.make_node("Identity", ["given"], ["logits"])], "main", values[:1], values[1:])
    versions = [helper.make_opsetid("com.microsoft", 1), helper.make_opsetid(domain, opset)]
    return helper.make_model(graph, opset_imports=versions[::-1] if is_first else versions, ir_version=8)


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
def test_an_extended_graph_tells_the_largest_of_each_block_and_the_sum(described: DecoderGraph, opset: int) -> None:
    added = extension(replace(described, opset=opset))
    assert added is not None
    content = graph_of_logits(opset).SerializeToString() + added
    onnx.checker.check_model(onnx.load_from_string(content))
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    logits = np.random.default_rng(1).normal(0, 3, (3, 2, VOCABULARY)).astype(np.float32)
    logits[2, 1, 100] = np.nan
    same, maxima, sums = session.run(["logits", MAXIMA, SUMS], {"given": logits})
    assert np.array_equal(same, logits, equal_nan=True)
    blocks = logits.reshape(3, 2, -1, BLOCK_LOGITS)
    assert (maxima[:2] == blocks[:2].max(axis=3)).all()
    assert sums[:2] == pytest.approx(logits[:2].sum(axis=2), abs=0.1)
    assert np.isnan(sums).tolist() == [[False, False], [False, False], [False, True]]
    excluded = np.where(np.arange(VOCABULARY) < 20, np.float32(-np.inf), logits[:2])
    assert not np.isnan(session.run([SUMS], {"given": excluded})[0]).any()


def test_a_files_own_outputs_stay_where_they_are(described: DecoderGraph) -> None:
    added = extension(replace(described, opset=21))
    assert added is not None
    model = onnx.load_from_string(graph_of_logits(21).SerializeToString() + added)
    assert [value.name for value in model.graph.output] == ["logits", MAXIMA, SUMS]


@pytest.mark.parametrize(
    "change",
    [
        {"opset": 0},
        {"opset": 12},
        {"logits_type": np.float16},
        {"vocabulary_size": VOCABULARY + 1},
        {"vocabulary_size": VOCABULARY_MIN - BLOCK_LOGITS},
    ],
)
def test_a_graph_that_it_would_not_serve_is_left_alone(described: DecoderGraph, change: dict[str, object]) -> None:
    assert extension(replace(described, opset=21)) is not None
    assert extension(replace(described, **{"opset": 21} | change)) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("domain", ["", "ai.onnx"])
@pytest.mark.parametrize("is_first", [True, False])
def test_the_opset_is_that_of_onnx_itself(tmp_path: Path, domain: str, is_first: bool) -> None:
    graph = graph_of_logits(17, domain, is_first=is_first)
    (tmp_path / "model.onnx").write_bytes(graph.SerializeToString())
    assert read_onnx_file(tmp_path / "model.onnx").opset == 17
