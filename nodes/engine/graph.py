"""How a decoder graph is to be run, told by what it holds: attention operator, inputs, shapes, types. Loads nothing.

Two kinds are served. A graph whose attention is com.microsoft GroupQueryAttention writes new keys and values into the
buffer that holds the past, each row at its own length: "shared". Any other returns past and new rows joined:
"concatenated". What neither the configuration nor the names of inputs explain is refused with a line that names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from nodes.engine import onnx_file
from nodes.engine.model_folder import (
    BUILD_FIX,
    GraphPlace,
    ModelFolder,
    ModelFolderInvalid,
    Precision,
    TensorNames,
)
from nodes.engine.onnx_file import OnnxFile, OnnxFileInvalid, OnnxValue, read_onnx_file

FloatType = type[np.float32] | type[np.float16]

SHARED_ATTENTION = "com.microsoft.GroupQueryAttention"
PAGED_ATTENTION = "com.microsoft.PagedAttention"
EXPORT_FIX = "export it again with `optimum-cli export onnx --task text-generation-with-past`"
FLOAT_TYPES: dict[int, FloatType] = {onnx_file.FLOAT: np.float32, onnx_file.FLOAT16: np.float16}
# Weights of these types, or operators with these in their names, compute with less than float32 somewhere.
REDUCED_TYPES = {
    onnx_file.FLOAT16: "fp16",
    onnx_file.BFLOAT16: "bf16",
    onnx_file.INT8: "int8",
    onnx_file.UINT8: "int8",
    onnx_file.INT4: "int4",
    onnx_file.UINT4: "int4",
}
REDUCING_OPERATORS = ("NBits", "Bnb4", "Quant", "Quantize", "MatMulInteger", "QLinear", "QMoE", "QAttention", "Fpq4")
# Inputs beside ids, mask and past that are understood. seqlens_k: int32 [batch], index of each row's newest key.
POSITION_IDS = "position_ids"
LOGITS_TO_KEEP = "num_logits_to_keep"
NEWEST_KEYS = "seqlens_k"
TOTAL_LENGTH = "total_sequence_length"
INTEGER_INPUTS = {
    POSITION_IDS: onnx_file.INT64,
    LOGITS_TO_KEEP: onnx_file.INT64,
    NEWEST_KEYS: onnx_file.INT32,
    TOTAL_LENGTH: onnx_file.INT32,
}

KvKind = Literal["shared", "concatenated"]
STEADY_BLOCK_MAX = 32  # the block size of int4 up to which rows of a batch do not influence each other


@dataclass(frozen=True, slots=True)
class DecoderGraph:
    """What a session needs to know of a graph.

    kv_bytes_per_row: of one token in one slot, all layers and both sides. is_pruned: gives logits of the last position
    only. is_exact: every weight and activation is float32. steady_rows_min: the fewest rows of a decode step from which
    a row's logits do not depend on how many there are. total_length_shape: of that input, () or (1,). opset: the
    version of ONNX's own operators, 0 where it is not known.
    """

    kind: KvKind
    names: TensorNames
    layers: int
    kv_heads: int
    head_size: int
    vocabulary_size: int
    kv_type: FloatType
    logits_type: FloatType
    is_pruned: bool
    is_exact: bool
    steady_rows_min: int
    has_mask: bool
    extra_inputs: frozenset[str]
    total_length_shape: tuple[int, ...] = ()
    opset: int = 0

    @property
    def kv_bytes_per_row(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_size * np.dtype(self.kv_type).itemsize

    def kv_names(self) -> Iterator[tuple[str, str]]:
        """(past, present) of each layer and side, in the order in which sessions keep their buffers."""
        return kv_names(self.names, self.layers)


def kv_names(names: TensorNames, layers: int) -> Iterator[tuple[str, str]]:
    for layer in range(layers):
        yield names.past_key % layer, names.present_key % layer
        yield names.past_value % layer, names.present_value % layer


def read_graph_file(folder: GraphPlace) -> OnnxFile:
    """Raises ModelFolderInvalid."""
    try:
        return read_onnx_file(folder.graph_file)
    except OnnxFileInvalid as exc:
        raise ModelFolderInvalid(folder.path, f"{folder.graph_name} cannot be loaded ({exc})", BUILD_FIX) from exc
    except OSError as exc:
        reason = f"{folder.graph_name} cannot be read ({exc.strerror})"
        raise ModelFolderInvalid(folder.path, reason, "make it readable") from exc


def check_external_files(folder: GraphPlace, graph: OnnxFile) -> tuple[Path, ...]:
    """The files in which the graph has its weights, by name. Raises ModelFolderInvalid for one that is missing or cut
    off, or that leads out of the folder: a graph is foreign, and what it names is read into memory."""
    files = []
    for location, needed_bytes in sorted(graph.external_files.items()):
        file = folder.graph_file.parent / location
        if Path(location).is_absolute() or "\0" in location or not _is_inside(file, folder.path):
            reason = f"{folder.graph_name} has weights in {location[:200]!r}, which is outside the folder"
            raise ModelFolderInvalid(
                folder.path, reason, "copy them beside it if they are yours, else do not use this model"
            )
        if not file.is_file():
            reason = f"{location} is missing, in which {folder.graph_name} has its weights"
            raise ModelFolderInvalid(folder.path, reason, BUILD_FIX)
        if (found_bytes := file.stat().st_size) < needed_bytes:
            needs = f"{folder.graph_name} needs {needed_bytes} bytes of it"
            reason = f"{location} is cut off: {needs}, and {found_bytes} are there"
            raise ModelFolderInvalid(folder.path, reason, "copy or download it again")
        files.append(file)
    return tuple(files)


def _is_inside(file: Path, folder: Path) -> bool:
    real, root = file.resolve(), folder.resolve()
    if real.is_relative_to(root):
        return True
    # A snapshot in the cache of huggingface_hub consists of links into `blobs`, two folders up.
    return root.parent.name == "snapshots" and real.parent == root.parent.parent / "blobs"


def precision_of(graph: OnnxFile) -> Precision:
    """The narrowest way in which weights are kept."""
    operators = {name.rpartition(".")[2] for name in graph.operators}
    for operator in ("MatMulNBits", "GatherBlockQuantized", "QMoE"):
        if operator in operators:
            return Precision(f"int{_largest(graph, operator, 'bits', 4)}", _block_size(graph, operator))
    if any("Bnb4" in operator or "Fpq4" in operator for operator in operators):
        return Precision("int4", _block_size(graph, "MatMulBnb4"))
    found = {REDUCED_TYPES[kind] for kind in graph.element_types & REDUCED_TYPES.keys()}
    if any(word in operator for word in REDUCING_OPERATORS for operator in operators):
        for kind in ("int4", "int8"):
            if kind in found:
                return Precision(kind, _block_size(graph, "DequantizeLinear"))
    for kind in ("fp16", "bf16"):
        if kind in found:
            return Precision(kind)
    return Precision("fp32")


def _largest(graph: OnnxFile, operator: str, attribute: str, default: int) -> int:
    return max(graph.integers.get(f"{operator}.{attribute}", {default}))


def _steady_rows_min(precision: Precision) -> int:
    """ONNX Runtime multiplies a single row by quantised weights with another kernel than several rows, which sums in
    another order; from two rows on all are alike, where blocks are small. With larger ones nothing is promised."""
    is_steady = precision.kind == "int4" and (precision.block_size or STEADY_BLOCK_MAX + 1) <= STEADY_BLOCK_MAX
    return 2 if is_steady else 1


def _block_size(graph: OnnxFile, operator: str) -> int | None:
    return _largest(graph, operator, "block_size", 0) or None


def describe_graph(folder: ModelFolder) -> DecoderGraph:
    """Read the graph's file and check it against the folder's numbers. Raises ModelFolderInvalid."""
    graph = read_graph_file(folder)
    check_external_files(folder, graph)
    return _Description(folder, graph).result()


class _Description:
    def __init__(self, folder: ModelFolder, graph: OnnxFile) -> None:
        self._folder = folder
        self._graph = graph

    def result(self) -> DecoderGraph:
        folder, names = self._folder, self._folder.tensors
        kind = self._kind()
        extra, has_mask = self._check_inputs(kind)
        kv_type = self._check_kv()
        logits = self._graph.outputs[names.logits]
        if len(logits.shape) != 3:
            raise self._invalid(f"has {names.logits} of {len(logits.shape)} dimensions, and 3 are served", EXPORT_FIX)
        self._expect("vocabulary", logits.shape[-1], folder.vocabulary_size)
        logits_type = self._float_type(logits)
        total = self._graph.inputs.get(TOTAL_LENGTH)
        return DecoderGraph(
            kind=kind,
            names=names,
            layers=folder.layers,
            kv_heads=folder.kv_heads,
            head_size=folder.head_size,
            vocabulary_size=folder.vocabulary_size,
            kv_type=kv_type,
            logits_type=logits_type,
            is_pruned=logits.shape[1] == 1 or LOGITS_TO_KEEP in extra,
            is_exact=self._is_exact(kv_type, logits_type),
            steady_rows_min=_steady_rows_min(precision_of(self._graph)),
            has_mask=has_mask,
            extra_inputs=extra,
            total_length_shape=(1,) if total is not None and len(total.shape) == 1 else (),
            opset=self._graph.opset,
        )

    def _kind(self) -> KvKind:
        operators, inputs = self._graph.operators, self._graph.inputs
        if operators[PAGED_ATTENTION] or "block_table" in inputs or "slot_mapping" in inputs:
            raise self._invalid("has paged attention, which only vLLM-like servers on CUDA feed", BUILD_FIX)
        if "use_cache_branch" in inputs:
            fix = f"choose a graph without that input (model.onnx in newer repositories), or {EXPORT_FIX}"
            raise self._invalid("is a merged decoder (input use_cache_branch)", fix)
        if "encoder_hidden_states" in inputs:
            raise self._invalid("is the decoder of an encoder-decoder model", "choose a decoder-only language model")
        if "inputs_embeds" in inputs and self._folder.tensors.input_ids not in inputs:
            fix = "choose a text-only model, whose graph takes input_ids"
            raise self._invalid("takes inputs_embeds: it is a part of a model for images or sound", fix)
        return "shared" if operators[SHARED_ATTENTION] else "concatenated"

    def _check_inputs(self, kind: KvKind) -> tuple[frozenset[str], bool]:
        """The extra inputs, and if there is a mask."""
        names, inputs, outputs = self._folder.tensors, self._graph.inputs, self._graph.outputs
        pairs = list(kv_names(names, self._folder.layers))
        required = {names.input_ids, *(past for past, _ in pairs)}
        lengths_given = kind == "shared" and {NEWEST_KEYS, TOTAL_LENGTH} <= inputs.keys()
        has_mask = names.attention_mask in inputs
        if not lengths_given:
            required.add(names.attention_mask)
        if missing := sorted(required - inputs.keys()):
            if not any(past in inputs for past, _ in pairs):
                raise self._invalid(f"has no input {pairs[0][0]}: it was exported without a KV cache", EXPORT_FIX)
            raise self._invalid(f"has no input {missing[0]}")
        known = required | {names.attention_mask, names.position_ids, LOGITS_TO_KEEP}
        if kind == "shared":
            known |= {NEWEST_KEYS, TOTAL_LENGTH}
        if extra := sorted(inputs.keys() - known):
            raise self._invalid(f"has an input {extra[0]} that {self._folder.layers} layers do not explain")
        if missing := sorted({names.logits, *(present for _, present in pairs)} - outputs.keys()):
            raise self._invalid(f"has no output {missing[0]}")
        for name in (names.input_ids, names.attention_mask):
            if name in inputs:
                self._expect_type(inputs[name], onnx_file.INT64, dimensions=2)
        found = set()
        for generic, element_type in INTEGER_INPUTS.items():
            name = names.position_ids if generic == POSITION_IDS else generic
            if name in inputs:
                self._expect_type(inputs[name], element_type, dimensions=2 if generic == POSITION_IDS else None)
                found.add(generic)
        return frozenset(found), has_mask

    def _check_kv(self) -> FloatType:
        """Every layer alike, past and present. Returns their type."""
        kinds = set()
        for past_name, present_name in kv_names(self._folder.tensors, self._folder.layers):
            past, present = self._graph.inputs[past_name], self._graph.outputs[present_name]
            if len(past.shape) != 4:
                raise self._invalid(f"has {past_name} of {len(past.shape)} dimensions, and 4 are served", EXPORT_FIX)
            self._expect("kv_heads", past.shape[1], self._folder.kv_heads)
            self._expect("head_size", past.shape[3], self._folder.head_size)
            kinds |= {self._float_type(past), self._float_type(present)}
        if len(kinds) > 1:
            raise self._invalid("keeps some keys and values in float and some in float16", EXPORT_FIX)
        return kinds.pop()

    def _is_exact(self, kv_type: FloatType, logits_type: FloatType) -> bool:
        graph = self._graph
        reduced = set(REDUCED_TYPES) - {onnx_file.UINT8, onnx_file.INT8}
        return (
            kv_type is np.float32
            and logits_type is np.float32
            and precision_of(graph).kind == "fp32"
            and not any(word in operator for word in REDUCING_OPERATORS for operator in graph.operators)
            and not graph.integers.get("Cast.to", set()) & reduced
        )

    def _float_type(self, value: OnnxValue) -> FloatType:
        if value.element_type not in FLOAT_TYPES:
            reason = f"has {value.name} of element type {value.element_type}, and only float and float16 are served"
            raise self._invalid(reason, EXPORT_FIX)
        return FLOAT_TYPES[value.element_type]

    def _expect_type(self, value: OnnxValue, element_type: int, dimensions: int | None) -> None:
        if value.element_type != element_type:
            reason = f"has {value.name} of element type {value.element_type}, and {element_type} is served"
            raise self._invalid(reason, EXPORT_FIX)
        if dimensions is not None and len(value.shape) != dimensions:
            reason = f"has {value.name} of {len(value.shape)} dimensions, and {dimensions} are served"
            raise self._invalid(reason, EXPORT_FIX)

    def _expect(self, what: str, found: int | None, configured: int) -> None:
        """An open dimension says nothing."""
        if found is not None and found != configured:
            raise self._invalid(f"has a {what} of {found}, and {self._folder.config_file} says {configured}")

    def _invalid(self, reason: str, fix: str = BUILD_FIX) -> ModelFolderInvalid:
        return ModelFolderInvalid(self._folder.path, f"{self._folder.graph_name} {reason}", fix)
