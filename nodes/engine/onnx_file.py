"""What an ONNX file holds, read off its protobuf wire format: operators, types, external files, inputs, outputs.

Weights are skipped, not read, so that a file of gigabytes takes as long as its nodes. The file is foreign: everything
is bounded, and whatever does not parse is OnnxFileInvalid. Field numbers are those of onnx.proto3, which never change
their meaning.
"""

from __future__ import annotations

import mmap
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

FIELDS_MAX = 20_000_000  # a few per node and tensor: a file with more is none
DEPTH_MAX = 8  # of graphs inside nodes
VALUES_MAX = 20_000  # inputs, outputs and external locations each; a model of 200 layers has 400 inputs
NAME_BYTES_MAX = 4096

# Wire types of protobuf.
VARINT, FIXED_64, LENGTH_DELIMITED, FIXED_32 = 0, 1, 2, 5

# onnx.TensorProto.DataType
FLOAT, UINT8, INT8, INT32, INT64, FLOAT16, BFLOAT16, UINT4, INT4 = 1, 2, 3, 6, 7, 10, 16, 21, 22
EXTERNAL = 1  # TensorProto.data_location
DIGITS = re.compile(r"[0-9]{1,18}")  # of a place in a file
OWN_DOMAINS = ("", "ai.onnx")  # ONNX's own operators


class OnnxFileInvalid(Exception):
    """The bytes are no ONNX model, or larger in some way than any is."""


@dataclass(frozen=True, slots=True)
class OnnxValue:
    """An input or output. element_type: a TensorProto.DataType, 0 where it is not said. shape: None for a dimension
    that is open."""

    name: str
    element_type: int
    shape: tuple[int | None, ...]


@dataclass(slots=True)
class OnnxFile:
    """Facts of one file, subgraphs and functions included, but for inputs and outputs, which are the main graph's.

    operators: how often each is used; one that is not ONNX's own as `domain.Operator`. element_types: of the
    constants and weights. integers: the values that attributes of operators have, by `Operator.attribute`.
    external_files: locations as they are written, relative to the file's folder if the file is an honest one, and how
    many bytes each has at least, as far as the graph says. opset: the version of ONNX's own operators, 0 where it is
    not said.
    """

    operators: Counter[str] = field(default_factory=Counter)
    element_types: set[int] = field(default_factory=set)
    integers: dict[str, set[int]] = field(default_factory=dict)
    external_files: dict[str, int] = field(default_factory=dict)
    opset: int = 0
    inputs: dict[str, OnnxValue] = field(default_factory=dict)
    outputs: dict[str, OnnxValue] = field(default_factory=dict)


def read_onnx_file(path: Path) -> OnnxFile:
    """Raises OnnxFileInvalid and OSError."""
    with path.open("rb") as stream:
        try:
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as exc:
            raise OnnxFileInvalid("it is empty") from exc
        with content:
            return _Walk(content).model()


# Attributes whose values tell the precision, or a weight's type.
INTEGER_ATTRIBUTES = frozenset({"bits", "block_size", "to", "local_window_size"})

Field = tuple[int, int, int, int]  # number, wire type, and either value and 0, or where the bytes begin and end


class _Walk:
    """Goes once through the messages of one file. Positions are bytes from the beginning."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._fields = 0
        self._file = OnnxFile()

    def model(self) -> OnnxFile:
        has_graph = False
        for number, wire, start, end in self._message(0, len(self._content)):
            if number == 7 and wire == LENGTH_DELIMITED:
                has_graph = True
                self._graph(start, end, depth=0)
            elif number == 8 and wire == LENGTH_DELIMITED:
                self._opset(start, end)
            elif number == 25 and wire == LENGTH_DELIMITED:
                self._function(start, end)
        if not has_graph:
            raise OnnxFileInvalid("it holds no graph")
        return self._file

    def _opset(self, start: int, end: int) -> None:
        domain, version = "", 0
        for number, wire, begin, stop in self._message(start, end):
            if number == 1 and wire == LENGTH_DELIMITED:
                domain = self._text(begin, stop)
            elif number == 2 and wire == VARINT:
                version = begin
        if domain in OWN_DOMAINS:
            self._file.opset = version

    def _graph(self, start: int, end: int, depth: int) -> None:
        if depth > DEPTH_MAX:
            raise OnnxFileInvalid(f"its graphs are nested more than {DEPTH_MAX} deep")
        inputs: list[OnnxValue] = []
        initializers: set[str] = set()
        for number, wire, begin, stop in self._message(start, end):
            if wire != LENGTH_DELIMITED:
                continue
            if number == 1:
                self._node(begin, stop, depth)
            elif number == 5:
                initializers.add(self._tensor(begin, stop))
            elif number == 15:
                self._sparse_tensor(begin, stop)
            elif number == 11 and depth == 0:
                inputs.append(self._value(begin, stop))
            elif number == 12 and depth == 0:
                value = self._value(begin, stop)
                self._file.outputs[value.name] = value
            if max(len(inputs), len(self._file.outputs), len(self._file.external_files)) > VALUES_MAX:
                raise OnnxFileInvalid(f"it has more than {VALUES_MAX} inputs, outputs or external files")
        # Old files list their weights among the inputs.
        self._file.inputs |= {value.name: value for value in inputs if value.name not in initializers}

    def _function(self, start: int, end: int) -> None:
        for number, wire, begin, stop in self._message(start, end):
            if number == 7 and wire == LENGTH_DELIMITED:
                self._node(begin, stop, depth=0)

    def _node(self, start: int, end: int, depth: int) -> None:
        operator = domain = ""
        attributes = []
        for number, wire, begin, stop in self._message(start, end):
            if wire != LENGTH_DELIMITED:
                continue
            if number == 4:
                operator = self._text(begin, stop)
            elif number == 7:
                domain = self._text(begin, stop)
            elif number == 5:
                attributes.append((begin, stop))
        self._file.operators[f"{domain}.{operator}" if domain not in OWN_DOMAINS else operator] += 1
        for begin, stop in attributes:
            self._attribute(operator, begin, stop, depth)

    def _attribute(self, operator: str, start: int, end: int, depth: int) -> None:
        name, integer = "", None
        for number, wire, begin, stop in self._message(start, end):
            if number == 1 and wire == LENGTH_DELIMITED:
                name = self._text(begin, stop)
            elif number == 3 and wire == VARINT:
                integer = begin
            elif number in (5, 10) and wire == LENGTH_DELIMITED:
                self._tensor(begin, stop)
            elif number in (6, 11) and wire == LENGTH_DELIMITED:
                self._graph(begin, stop, depth + 1)
            elif number in (22, 23) and wire == LENGTH_DELIMITED:
                self._sparse_tensor(begin, stop)
        if name in INTEGER_ATTRIBUTES and integer is not None:
            self._file.integers.setdefault(f"{operator}.{name}", set()).add(integer)

    def _tensor(self, start: int, end: int) -> str:
        """Its name, which may be empty."""
        name, is_external = "", False
        place: dict[str, str] = {}  # location, offset and length, as texts
        for number, wire, begin, stop in self._message(start, end):
            if number == 2 and wire == VARINT:
                self._file.element_types.add(begin)
            elif number == 8 and wire == LENGTH_DELIMITED:
                name = self._text(begin, stop)
            elif number == 13 and wire == LENGTH_DELIMITED:
                place |= self._entry(begin, stop)
            elif number == 14 and wire == VARINT:
                is_external = begin == EXTERNAL
        location = place.get("location")
        if is_external and location is None:
            raise OnnxFileInvalid(f"tensor {name[:100]} has its data in a file that is not named")
        if location is not None:
            needed = sum(int(digits) for key in ("offset", "length") if DIGITS.fullmatch(digits := place.get(key, "")))
            self._file.external_files[location] = max(needed, self._file.external_files.get(location, 0))
        return name

    def _entry(self, start: int, end: int) -> dict[str, str]:
        """Of external_data."""
        key = value = ""
        for number, wire, begin, stop in self._message(start, end):
            if number == 1 and wire == LENGTH_DELIMITED:
                key = self._text(begin, stop)
            elif number == 2 and wire == LENGTH_DELIMITED:
                value = self._text(begin, stop)
        return {key: value}

    def _sparse_tensor(self, start: int, end: int) -> None:
        for number, wire, begin, stop in self._message(start, end):
            if number in (1, 2) and wire == LENGTH_DELIMITED:
                self._tensor(begin, stop)

    def _value(self, start: int, end: int) -> OnnxValue:
        name, element_type, shape = "", 0, []
        for number, wire, begin, stop in self._message(start, end):
            if number == 1 and wire == LENGTH_DELIMITED:
                name = self._text(begin, stop)
            elif number == 2 and wire == LENGTH_DELIMITED:  # TypeProto
                for tensor in self._inner(begin, stop, 1):  # its tensor_type
                    for field_number, field_wire, first, last in self._message(*tensor):
                        if field_number == 1 and field_wire == VARINT:
                            element_type = first
                        elif field_number == 2 and field_wire == LENGTH_DELIMITED:
                            shape = [self._dimension(*dimension) for dimension in self._inner(first, last, 1)]
        return OnnxValue(name, element_type, tuple(shape))

    def _dimension(self, start: int, end: int) -> int | None:
        for number, wire, value, _ in self._message(start, end):
            if number == 1 and wire == VARINT:
                return value
        return None

    def _inner(self, start: int, end: int, wanted: int) -> list[tuple[int, int]]:
        return [
            (begin, stop)
            for number, wire, begin, stop in self._message(start, end)
            if number == wanted and wire == LENGTH_DELIMITED
        ]

    def _message(self, start: int, end: int) -> Iterator[Field]:
        position = start
        while position < end:
            self._fields += 1
            if self._fields > FIELDS_MAX:
                raise OnnxFileInvalid(f"it has more than {FIELDS_MAX} fields")
            tag, position = self._varint(position, end)
            number, wire = tag >> 3, tag & 7
            if wire == VARINT:
                value, position = self._varint(position, end)
                yield number, wire, value, 0
                continue
            if wire == LENGTH_DELIMITED:
                length, position = self._varint(position, end)
            elif wire in (FIXED_64, FIXED_32):
                length = 8 if wire == FIXED_64 else 4
            else:
                raise OnnxFileInvalid(f"it is no protobuf: wire type {wire} at byte {position}")
            stop = position + length
            if number == 0 or stop > end:
                raise OnnxFileInvalid(f"it is cut off or no protobuf: a field at byte {position} ends at {stop}")
            yield number, wire, position, stop
            position = stop

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        """The value and the position after it."""
        value = 0
        for shift in range(0, 70, 7):
            if position >= end:
                break
            byte = self._content[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
        raise OnnxFileInvalid(f"it is cut off or no protobuf: a number at byte {position} has no end")

    def _text(self, start: int, end: int) -> str:
        if end - start > NAME_BYTES_MAX:
            raise OnnxFileInvalid(f"a name at byte {start} has {end - start} bytes, and {NAME_BYTES_MAX} are plenty")
        return self._content[start:end].decode("utf-8", "replace")
