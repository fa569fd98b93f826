"""The reader of ONNX's wire format, against files that onnx wrote and against bytes that nobody should have written."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from nodes.engine import onnx_file
from nodes.engine.onnx_file import OnnxFileInvalid, OnnxValue, read_onnx_file
from nodes.model_tools.random_llama import write_random_llama


@pytest.fixture(scope="module")
def graph_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_llama(tmp_path_factory.mktemp("tiny")) / "model.onnx"


def test_it_says_what_onnx_says(graph_file: Path) -> None:
    found, graph = read_onnx_file(graph_file), onnx.load(str(graph_file)).graph
    names = [f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in graph.node]
    assert dict(found.operators) == {name: names.count(name) for name in set(names)}
    assert found.element_types == {constant.data_type for constant in graph.initializer}
    assert found.integers == {"Cast.to": {TensorProto.INT32}}
    assert found.external_files == {}
    assert list(found.inputs) == [value.name for value in graph.input]
    assert list(found.outputs) == [value.name for value in graph.output]
    assert found.inputs["past_key_values.1.value"] == OnnxValue(
        "past_key_values.1.value", TensorProto.FLOAT, (None, 2, None, 16)
    )
    assert found.outputs["logits"].shape == (None, 1, 512)


def test_external_files_are_found_wherever_a_tensor_may_be(tmp_path: Path) -> None:
    def tensor(name: str) -> onnx.TensorProto:
        made = helper.make_tensor(name, TensorProto.FLOAT16, [0], b"", raw=True)
        made.data_location = TensorProto.EXTERNAL
        made.external_data.add(key="offset", value="4096")
        made.external_data.add(key="length", value=str(len(name)))
        made.external_data.add(key="location", value=f"{name}.bin")
        return made

    inner = helper.make_graph([], "inner", [], [], [tensor("in_subgraph")])
    constant = helper.make_node("Constant", [], ["c"], value=tensor("in_attribute"))
    branch = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    sparse = onnx.SparseTensorProto(values=tensor("in_sparse"), indices=tensor("in_indices"), dims=[1])
    graph = helper.make_graph([constant, branch], "main", [], [], [tensor("in_graph")])
    graph.sparse_initializer.append(sparse)
    model = helper.make_model(graph)
    model.functions.append(
        helper.make_function(
            "local", "f", [], ["c"], [helper.make_node("Constant", [], ["c"], value=tensor("in_function"))], []
        )
    )
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    found = read_onnx_file(tmp_path / "model.onnx")
    places = ("attribute", "function", "graph", "indices", "sparse", "subgraph")
    assert found.external_files == {f"in_{place}.bin": 4096 + len(f"in_{place}") for place in places}
    assert found.element_types == {TensorProto.FLOAT16}
    assert found.operators["Constant"] == 2


def test_weights_listed_as_inputs_are_no_inputs(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("w", TensorProto.FLOAT, [2])
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", 2])
    weight = numpy_helper.from_array(np.zeros(2, np.float32), "w")
    (tmp_path / "m.onnx").write_bytes(
        helper.make_model(helper.make_graph([], "g", [value, ids], [], [weight])).SerializeToString()
    )
    assert read_onnx_file(tmp_path / "m.onnx").inputs == {"ids": OnnxValue("ids", TensorProto.INT64, (None, 2))}


def serialized(graph: onnx.GraphProto) -> bytes:
    return bytes(helper.make_model(graph).SerializeToString())


def nested(depth: int) -> onnx.GraphProto:
    graph = helper.make_graph([], "leaf", [], [])
    for _ in range(depth):
        graph = helper.make_graph([helper.make_node("If", ["x"], ["y"], then_branch=graph)], "g", [], [])
    return graph


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"\x00garbage", "no protobuf"),
        (b"\x08\x08", "no graph"),
        (b"\x3a\xff\xff\xff\xff\x7f", "cut off"),
        (b"\x08" + b"\xff" * 12, "has no end"),
        (b"\x0b", "wire type 3"),
        (serialized(nested(onnx_file.DEPTH_MAX + 1)), "nested more than 8"),
        (serialized(helper.make_graph([helper.make_node("A" * 5000, [], [])], "g", [], [])), "5000 bytes"),
    ],
    ids=["empty", "garbage", "no graph", "cut off", "endless number", "group", "deep", "long name"],
)  # fmt: skip
def test_what_is_no_model_is_refused_with_a_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(OnnxFileInvalid, match=reason):
        read_onnx_file(tmp_path / "model.onnx")


def test_more_fields_than_any_model_has_are_refused(graph_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "FIELDS_MAX", 100)
    with pytest.raises(OnnxFileInvalid, match="more than 100 fields"):
        read_onnx_file(graph_file)


SMALL = helper.make_model(
    helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["c"], bits=4)],
        "g",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, [1, "n"])],
        [],
        [numpy_helper.from_array(np.arange(3, dtype=np.int64), "b")],
    )
).SerializeToString()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(st.data())
def test_any_bytes_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / "model.onnx"
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with suppress(OnnxFileInvalid):
        read_onnx_file(file)
