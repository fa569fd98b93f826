"""Adds outputs to a decoder graph that tell where its logits are large: the largest of each block, and the sum of all.

The graph's file is not parsed. Protocol buffers that follow one another are one message, in which repeated fields are
joined: so what is added is a model of its own, of nodes and outputs alone, whose bytes come after the file's. Field
numbers are those of onnx.proto3, which never change their meaning.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from nodes.engine.graph import DecoderGraph
from nodes.engine.logit_rows import BLOCK_LOGITS
from nodes.engine.onnx_file import FLOAT, INT64, LENGTH_DELIMITED, VARINT

# Names of the outputs: [batch, tokens, blocks] and [batch, tokens], float32.
MAXIMA = "ai_cluster/block_maxima"
SUMS = "ai_cluster/logit_sums"

VOCABULARY_MIN = 8192  # a smaller row is read as fast
OPSET_MIN, OPSET_AXES_INPUT = 13, 18  # of ReduceSum and of ReduceMax with axes as an input
ATTRIBUTE_INT, ATTRIBUTE_INTS = 2, 7  # AttributeProto.AttributeType


def extension(graph: DecoderGraph) -> bytes | None:
    """What to append to the graph's file; None for a graph of which not enough is known, or that it would not serve."""
    vocabulary = graph.vocabulary_size
    is_served = graph.logits_type is np.float32 and vocabulary % BLOCK_LOGITS == 0 and vocabulary >= VOCABULARY_MIN
    if not is_served or graph.opset < OPSET_MIN:
        return None
    shape, axes, blocks = (f"ai_cluster/{name}" for name in ("blocks_shape", "last_axis", "blocks"))
    count = vocabulary // BLOCK_LOGITS
    parts = [
        _integers(shape, [0, 0, count, BLOCK_LOGITS]),  # 0: as it was
        _integers(axes, [-1]),
        _node("Reshape", [graph.names.logits, shape], blocks),
        _reduction("ReduceMax", blocks, axes, MAXIMA, has_axes_input=graph.opset >= OPSET_AXES_INPUT),
        _reduction("ReduceSum", graph.names.logits, axes, SUMS, has_axes_input=True),
        _output(MAXIMA, ["ai_cluster/batch", "ai_cluster/tokens", count]),
        _output(SUMS, ["ai_cluster/batch", "ai_cluster/tokens"]),
    ]
    return _bytes(7, b"".join(parts))  # ModelProto.graph


def _reduction(operator: str, source: str, axes: str, target: str, *, has_axes_input: bool) -> bytes:
    attributes = [_bytes(1, b"keepdims") + _integer(3, 0) + _integer(20, ATTRIBUTE_INT)]
    if not has_axes_input:
        attributes.append(_bytes(1, b"axes") + _integer(8, -1) + _integer(20, ATTRIBUTE_INTS))
    return _node(operator, [source, axes] if has_axes_input else [source], target, attributes)


# Fields of GraphProto.


def _node(operator: str, inputs: Iterable[str], output: str, attributes: Iterable[bytes] = ()) -> bytes:
    fields = [_bytes(1, name.encode()) for name in inputs]
    fields += [_bytes(2, output.encode()), _bytes(3, f"{output}/{operator}".encode()), _bytes(4, operator.encode())]
    return _bytes(1, b"".join([*fields, *(_bytes(5, attribute) for attribute in attributes)]))


def _integers(name: str, values: list[int]) -> bytes:
    """An initializer."""
    fields = [_integer(1, len(values)), _integer(2, INT64), *(_integer(7, value) for value in values)]
    return _bytes(5, b"".join([*fields, _bytes(8, name.encode())]))


def _output(name: str, dimensions: Iterable[str | int]) -> bytes:
    shape = b"".join(
        _bytes(1, _integer(1, size) if isinstance(size, int) else _bytes(2, size.encode())) for size in dimensions
    )
    tensor_type = _integer(1, FLOAT) + _bytes(2, shape)
    return _bytes(12, _bytes(1, name.encode()) + _bytes(2, _bytes(1, tensor_type)))


# The wire format.


def _integer(number: int, value: int) -> bytes:
    return _varint(number << 3 | VARINT) + _varint(value)


def _bytes(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | LENGTH_DELIMITED) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    """Negative numbers as 64 bits, like an int64 of protobuf."""
    value &= (1 << 64) - 1
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
