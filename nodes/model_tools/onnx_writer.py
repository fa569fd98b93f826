"""Writes ONNX files: a graph in, `model.onnx` and, for large weights, `model.onnx.data` out. Needs no protobuf library.

An ONNX file is one protobuf message, of which a decoder graph uses a small part: the encoding is a few lines. Weights
are made one at a time as they are written, so that a model larger than the memory can be written.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

GRAPH_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
IR_VERSION = 10
OPSET = 21
MICROSOFT = "com.microsoft"
INLINE_BYTES_MAX = 1024  # beside a data file, smaller tensors stay in the graph, where shape inference reads them
DATA_ALIGNMENT_BYTES = 4096  # a page: ONNX Runtime maps the data file and uses the weights where they lie

# TensorProto.DataType and AttributeProto.AttributeType of onnx.proto.
ELEMENT_TYPES: dict[str, int] = {"float32": 1, "uint8": 2, "int32": 6, "int64": 7, "float16": 10}
ATTRIBUTE_FLOAT, ATTRIBUTE_INT, ATTRIBUTE_INTS = 1, 2, 7
EXTERNAL = 1

AnyArray = npt.NDArray[Any]
Attribute = int | float | Sequence[int]
Dims = Sequence[int | str]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Tensor:
    """An initializer that is still to be made. dtype: one of ELEMENT_TYPES."""

    name: str
    dtype: str
    dims: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.dims, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Payload:
    """Tensors that are made together, as the nibbles and scales of one matrix are. make: arrays in the same order."""

    tensors: tuple[Tensor, ...]
    make: Callable[[], Sequence[AnyArray]]


@dataclass(slots=True)
class Graph:
    """A graph while it is built. Values are named after the node that makes them: `NAME/output_0`."""

    nodes: list[bytes] = field(default_factory=list)
    payloads: list[Payload] = field(default_factory=list)
    inputs: list[bytes] = field(default_factory=list)
    outputs: list[bytes] = field(default_factory=list)

    def node(
        self,
        kind: str,
        inputs: Sequence[str],
        name: str,
        *,
        outputs: Sequence[str] = (),
        domain: str = "",
        attributes: Mapping[str, Attribute] | None = None,
    ) -> str:
        """Add one node; an input or output "" is left out. Returns its first output."""
        outputs = outputs or [f"{name}/output_0"]
        parts = [_text(1, value) for value in inputs]
        parts += [_text(2, value) for value in outputs]
        parts += [_text(3, name), _text(4, kind)]
        parts += [_message(5, _attribute(key, value)) for key, value in (attributes or {}).items()]
        if domain:
            parts.append(_text(7, domain))
        self.nodes.append(b"".join(parts))
        return outputs[0]

    def constant(self, name: str, value: AnyArray) -> str:
        """Add an initializer that is there already. Returns its name."""
        self.payloads.append(Payload((Tensor(name, value.dtype.name, value.shape),), lambda: [value]))
        return name

    def input(self, name: str, dtype: str, dims: Dims) -> None:
        """dims: a text is a symbolic dimension."""
        self.inputs.append(_value_info(name, dtype, dims))

    def output(self, name: str, dtype: str, dims: Dims) -> None:
        self.outputs.append(_value_info(name, dtype, dims))

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for payload in self.payloads for tensor in payload.tensors)


def save_graph(
    graph: Graph, folder: Path, *, embedded_bytes_max: int, progress: Progress = lambda written, total: None
) -> None:
    """Write GRAPH_FILE into folder, and DATA_FILE beside it when the weights have more than embedded_bytes_max.

    Memory: one payload beside the embedded weights. progress is called with weight bytes written so far and in all.
    Raises OSError; files written until then stay.
    """
    total = graph.weight_bytes
    data_file = folder / DATA_FILE
    data_file.unlink(missing_ok=True)
    initializers: list[bytes] = []
    written = 0

    def put(payload: Payload, data: Any) -> None:
        nonlocal written
        arrays = payload.make()
        for tensor, array in zip(payload.tensors, arrays, strict=True):
            assert (array.dtype, array.shape) == (np.dtype(tensor.dtype), tensor.dims), f"{tensor}: {array.shape}"
            little_endian = np.ascontiguousarray(array, np.dtype(tensor.dtype).newbyteorder("<"))
            if data is None or tensor.nbytes < INLINE_BYTES_MAX:
                initializers.append(_tensor(tensor, _message(9, little_endian.tobytes())))
            else:
                offset = -(-data.tell() // DATA_ALIGNMENT_BYTES) * DATA_ALIGNMENT_BYTES
                data.seek(offset)
                data.write(little_endian.data)
                initializers.append(_tensor(tensor, _external(offset, tensor.nbytes)))
            written += tensor.nbytes
        progress(written, total)

    if total > embedded_bytes_max:
        with data_file.open("wb") as data:
            for payload in graph.payloads:
                put(payload, data)
    else:
        for payload in graph.payloads:
            put(payload, None)
    _write_model(graph, initializers, folder / GRAPH_FILE)


def _write_model(graph: Graph, initializers: list[bytes], file: Path) -> None:
    parts = [_message(1, node) for node in graph.nodes]
    parts.append(_text(2, "main_graph"))
    parts += [_message(5, tensor) for tensor in initializers]
    parts += [_message(11, value) for value in graph.inputs]
    parts += [_message(12, value) for value in graph.outputs]
    header = [_integer(1, IR_VERSION), _text(2, "ai-cluster")]
    header.append(_key(7, 2) + _varint(sum(map(len, parts))))
    opsets = [_message(8, _text(1, domain) + _integer(2, version)) for domain, version in (("", OPSET), (MICROSOFT, 1))]
    with file.open("wb") as stream:
        stream.writelines(header + parts + opsets)


def _attribute(name: str, value: Attribute) -> bytes:
    head = _text(1, name)
    if isinstance(value, float):
        return head + _key(2, 5) + struct.pack("<f", value) + _integer(20, ATTRIBUTE_FLOAT)
    if isinstance(value, int):
        return head + _integer(3, value) + _integer(20, ATTRIBUTE_INT)
    return head + b"".join(_integer(8, number) for number in value) + _integer(20, ATTRIBUTE_INTS)


def _tensor(tensor: Tensor, content: bytes) -> bytes:
    dims = b"".join(_integer(1, size) for size in tensor.dims)
    return dims + _integer(2, ELEMENT_TYPES[tensor.dtype]) + _text(8, tensor.name) + content


def _external(offset: int, length: int) -> bytes:
    entries = {"location": DATA_FILE, "offset": str(offset), "length": str(length)}
    pairs = (_message(13, _text(1, key) + _text(2, value)) for key, value in entries.items())
    return b"".join(pairs) + _integer(14, EXTERNAL)


def _value_info(name: str, dtype: str, dims: Dims) -> bytes:
    shape = b"".join(_message(1, _text(2, size) if isinstance(size, str) else _integer(1, size)) for size in dims)
    tensor_type = _integer(1, ELEMENT_TYPES[dtype]) + _message(2, shape)
    return _text(1, name) + _message(2, _message(1, tensor_type))


# Protobuf's encoding: a key (field number, wire type), then a varint, four bytes, or a length and that many bytes.


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers are written as two's complement of 64 bits
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _key(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _integer(number: int, value: int) -> bytes:
    return _key(number, 0) + _varint(value)


def _message(number: int, content: bytes) -> bytes:
    return _key(number, 2) + _varint(len(content)) + content


def _text(number: int, value: str) -> bytes:
    return _message(number, value.encode())
