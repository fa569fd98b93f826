"""Which graph of a folder to serve: repositories hold one model in several precisions.

Graphs are model*.onnx in the folder or in its subfolder onnx/. A variant is named by what follows `model`, without the
underscore: `q4f16` is onnx/model_q4f16.onnx, and `fp32` is model.onnx where no other graph has that name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from nodes.engine.model_folder import ModelFolderInvalid

GRAPH_FOLDERS = ("", "onnx")
LISTED_MAX = 12  # variants in one message
WHOLE = "fp32"  # what model.onnx may be called

# What runs best first. On the CPU decoding is bound by memory bandwidth: 4-bit weights take the least, and fp16 is not
# computed natively by most processors, so it comes last. On CUDA fp16 arithmetic with 4-bit weights is both smallest
# and fastest, and int8 in ONNX's dynamic form has no CUDA kernels. Names that are not listed come after those that are.
PREFERENCES: dict[str, tuple[str, ...]] = {
    "cpu": ("q4", "int4", "int8", "quantized", "q8", "uint8", "", "bnb4", "q4f16", "fp16"),
    "cuda": ("q4f16", "fp16", "q4", "int4", "", "bnb4", "int8", "quantized", "q8", "uint8"),
}


def find_variants(path: Path) -> dict[str, Path]:
    """Graphs by variant, "" for model.onnx. A graph in the folder wins over one of the same name in onnx/."""
    found: dict[str, Path] = {}
    for folder in GRAPH_FOLDERS:
        for file in sorted((path / folder).glob("model*.onnx")):
            if file.is_file():
                found.setdefault(file.stem.removeprefix("model").lstrip("_-."), file)
    return found


def choose_variant(path: Path, wanted: str | None, processor: Literal["cpu", "cuda"]) -> tuple[str, Path]:
    """The variant and its graph: the one of that name, else the one that runs best on the processor.

    wanted: a variant, or the graph's file name. Raises ModelFolderInvalid, which lists the variants there."""
    found = find_variants(path)
    if not found:
        raise ModelFolderInvalid(path, *_nothing_to_serve(path))
    if wanted is None:
        order = PREFERENCES[processor]
        name = min(found, key=lambda name: (order.index(name) if name in order else len(order), name))
        return name, found[name]
    for name, file in found.items():
        if wanted in (name or WHOLE, file.name, file.stem, file.relative_to(path).as_posix()):
            return name, file
    listed = ", ".join(sorted(name or WHOLE for name in found)[:LISTED_MAX])
    raise ModelFolderInvalid(path, f"it has no variant {wanted!r}", f"choose one of: {listed}")


def _nothing_to_serve(path: Path) -> tuple[str, str]:
    others = sorted(file.name for folder in GRAPH_FOLDERS for file in (path / folder).glob("*.onnx"))[:LISTED_MAX]
    if not others:
        return "model.onnx is missing, and onnx/ holds no graph", "download the folder again, with its onnx/ folder"
    fix = "export it as one graph with a KV cache: `optimum-cli export onnx --task text-generation-with-past`"
    return f"none of its graphs is named model*.onnx ({', '.join(others)})", fix
