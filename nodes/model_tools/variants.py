"""Which files of a repository make one model: a graph, what belongs to it, and where they go in the folder.

Repositories hold a model as folders of the genai builder (each with its genai_config.json, at the top or below), or as
optimum and onnx-community write it: one configuration at the top and graphs of several precisions in onnx/.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePosixPath

from nodes.engine.model_variants import GRAPH_FOLDERS, LISTED_MAX, PREFERENCES, WHOLE
from nodes.model_tools.errors import ModelToolError

GENAI_CONFIG_FILE = "genai_config.json"
BUILDER = "genai"  # the name of a builder's folder at the top of its repository
# Beside the graph's own files. Not weights of other frameworks, and no code.
COMPANION_FILES = (
    GENAI_CONFIG_FILE,
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    # Of embedding models: without them vectors would be made in another way than their author means.
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)


@dataclass(frozen=True, slots=True)
class Variant:
    """One model of a repository. name: what --variant takes. graph: its path in the repository, None where
    genai_config.json in `folder` names it. folder: the repository's folder that becomes the model folder."""

    name: str
    graph: str | None
    folder: str


def find_variants(paths: Collection[str]) -> list[Variant]:
    """What can be pulled from a repository with these files, by name."""
    genai_folders = {_parent(path) for path in paths if PurePosixPath(path).name == GENAI_CONFIG_FILE}
    found = [Variant(folder or BUILDER, None, folder) for folder in sorted(genai_folders)]
    for path in sorted(paths):
        file, folder = PurePosixPath(path), _parent(path)
        is_graph = file.suffix == ".onnx" and file.stem.startswith("model")
        if is_graph and folder in GRAPH_FOLDERS and folder not in genai_folders:
            found.append(Variant(file.stem.removeprefix("model").lstrip("_-.") or WHOLE, path, ""))
    return found


def choose_variant(repo: str, paths: Collection[str], wanted: str | None) -> Variant:
    """The variant of that name, else the one that runs best on a CPU. Raises ModelToolError, which lists them."""
    found = find_variants(paths)
    if not found:
        raise ModelToolError(
            f"{repo} has no ONNX graph for text generation; look for its ONNX version on the hub (onnx-community), or "
            "download it and run `ai-cluster models build`"
        )
    if wanted is not None:
        matches = [variant for variant in found if wanted in _names(variant)]
        if matches:
            return matches[0]
        raise ModelToolError(f"{repo} has no variant {wanted!r}; choose one of: {_listed(found)}")
    if len(found) == 1:
        return found[0]
    for variant in found:
        if variant.graph is None and not variant.folder:
            return variant
    for_cpu = [variant for variant in found if variant.graph is None and "cpu" in variant.folder.lower()]
    if len(for_cpu) == 1:
        return for_cpu[0]
    order = [name or WHOLE for name in PREFERENCES["cpu"]]
    graphs = [variant for variant in found if variant.graph is not None]
    if for_cpu or not graphs:
        raise ModelToolError(f"{repo} has several models; choose one with --variant: {_listed(for_cpu or found)}")
    return min(graphs, key=lambda variant: order.index(variant.name) if variant.name in order else len(order))


def companions(variant: Variant, paths: Collection[str]) -> dict[str, str]:
    """Configuration and tokenizer of a variant: place in the model folder by path in the repository.

    What a builder's folder lacks is taken from the repository's top."""
    placed = {}
    for name in COMPANION_FILES:
        own = f"{variant.folder}/{name}" if variant.folder else name
        if own in paths:
            placed[own] = name
        elif name in paths and name != GENAI_CONFIG_FILE:
            placed[name] = name
    return placed


def place(variant: Variant, path: str) -> str:
    """Where a file of the variant's folder goes in the model folder."""
    return path.removeprefix(f"{variant.folder}/") if variant.folder else path


def is_inside(path: str) -> bool:
    """Whether a relative path with slashes stays in its folder on every system."""
    pure = PurePosixPath(path)
    return bool(path) and not pure.is_absolute() and ".." not in pure.parts and "\\" not in path and ":" not in path


def _names(variant: Variant) -> set[str]:
    path = PurePosixPath(variant.graph or variant.folder)
    return {variant.name, str(path), path.name, path.stem}


def _listed(variants: list[Variant]) -> str:
    names = [variant.name for variant in variants]
    return ", ".join(names[:LISTED_MAX]) + (" ..." if len(names) > LISTED_MAX else "")


def _parent(path: str) -> str:
    parent = str(PurePosixPath(path).parent)
    return "" if parent == "." else parent
