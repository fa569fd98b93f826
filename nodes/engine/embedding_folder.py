"""What the folder of an embedding model says of itself, checked: graph, pooling, normalisation, longest input.

An embedding model is an encoder graph that gives hidden states (last_hidden_state or token_embeddings) or vectors
(sentence_embedding), as optimum and sentence-transformers export them, beside config.json and tokenizer.json. How the
states become a vector is in modules.json and 1_Pooling/config.json, where these are there; else it is the mean, at
length 1. Whether a folder is of this kind is told by the graph. What would be computed otherwise than the model's
author meant is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from nodes.engine import onnx_file
from nodes.engine.devices import Provider, likely_processor
from nodes.engine.folder_files import CONFIG_BYTES_MAX, TOKENIZER_CONFIG_FILE, Fields, read_json
from nodes.engine.graph import FLOAT_TYPES, check_external_files, precision_of, read_graph_file
from nodes.engine.model_configs import GENAI_CONFIG_FILE, HUGGING_FACE_CONFIG_FILE
from nodes.engine.model_folder import ModelFolderInvalid, Precision, name_in
from nodes.engine.model_loader import TOKENIZER_FILE, fingerprint_of_parts
from nodes.engine.model_variants import choose_variant, find_variants
from nodes.engine.onnx_file import OnnxFile, OnnxFileInvalid, read_onnx_file
from nodes.engine.pooling import Pooling
from nodes.engine.tokenizer import Tokenizer, TokenizerInvalid

MODULES_FILE = "modules.json"
POOLING_FILE = "1_Pooling/config.json"
SENTENCE_CONFIG_FILE = "sentence_bert_config.json"
SENTENCE_TRANSFORMERS_FILE = "config_sentence_transformers.json"
EXPORT_FIX = "export it again with `optimum-cli export onnx --task feature-extraction`"

INPUT_IDS, ATTENTION_MASK, TOKEN_TYPE_IDS, POSITION_IDS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
)
INPUTS = (INPUT_IDS, ATTENTION_MASK, TOKEN_TYPE_IDS, POSITION_IDS)
POOLED = "sentence_embedding"
HIDDEN_STATES = ("last_hidden_state", "token_embeddings")
# These count positions from behind the padding token's id, so that many of a table's rows are of no token.
OFFSET_MODEL_TYPES = ("roberta", "xlm-roberta", "camembert", "mpnet")
POOLING_MODES: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}
# What runs best first where there is no graph in float32, whose results alone do not depend on the device.
PREFERENCES = ("", "fp32", "fp16")
LENGTH_MAX = 10**6  # transformers writes 1e30 into model_max_length where it knows of no limit
PAD_ID_DEFAULT = 0
FULL_PRECISION = Precision("fp32")


@dataclass(frozen=True, slots=True)
class EmbeddingFolder:
    """The configuration of one folder. context_length: tokens of the longest input.

    graph_file, variant, external_files: as in ModelFolder. inputs: of the graph. output: the one that is read; pooling:
    how vectors are made of it, None where it has vectors already. is_normalized: vectors have length 1. is_lower_case:
    texts are made lower case first. vocabulary_size: None where config.json does not say."""

    path: Path
    graph_file: Path
    variant: str
    context_length: int
    vocabulary_size: int | None
    pad_id: int
    inputs: tuple[str, ...]
    output: str
    pooling: Pooling | None
    is_normalized: bool
    is_lower_case: bool = False
    precision: Precision = FULL_PRECISION
    external_files: tuple[Path, ...] = ()

    @property
    def graph_name(self) -> str:
        return name_in(self.path, self.graph_file)

    def weight_files(self) -> list[Path]:
        return [self.graph_file, *self.external_files]


@dataclass(frozen=True, slots=True)
class LoadedEmbeddingModel:
    """What an engine needs of a model beside its session. weight_bytes: on disk, and about that in memory."""

    fingerprint: str
    tokenizer: Tokenizer
    vocabulary_size: int
    context_length: int
    is_lower_case: bool = False
    weight_bytes: int = 0

    def encode(self, text: str) -> list[int]:
        """Ids of one input, with those that the tokenizer puts around it. Raises PromptTooLong for a text that is far
        too long; one that is a little too long has more ids than context_length."""
        text = text.lower() if self.is_lower_case else text
        return self.tokenizer.encode(text, self.context_length, adds_special_tokens=True)


def is_embedding_folder(path: Path) -> bool:
    """By what its graphs give. False also where nothing can be read: then a language model's loader says why."""
    if (path / GENAI_CONFIG_FILE).exists():
        return False
    for _, file in sorted(find_variants(path).items()):
        try:
            graph = read_onnx_file(file)
        except (OnnxFileInvalid, OSError):
            continue
        return _is_embedding_graph(graph)
    return False


def _is_embedding_graph(graph: OnnxFile) -> bool:
    has_past = any(name.startswith("past_key") for name in graph.inputs)
    gives = any(name in graph.outputs for name in (POOLED, *HIDDEN_STATES))
    return gives and not has_past and "logits" not in graph.outputs


def read_embedding_folder(path: Path, variant: str | None = None, provider: Provider = "auto") -> EmbeddingFolder:
    """Read and check all but weights and tokenizer. Raises ModelFolderInvalid.

    variant: which of several graphs, by name; None: the one in float32, where there is one."""
    name, graph_file = _choose(path, variant, provider)
    config = Fields(path, HUGGING_FACE_CONFIG_FILE)
    if not (path / TOKENIZER_FILE).is_file():
        raise ModelFolderInvalid(path, f"{TOKENIZER_FILE} is missing", "copy the folder again")
    pad_id = config.content.get("pad_token_id")
    vocabulary_size = config.content.get("vocab_size")
    folder = EmbeddingFolder(
        path=path,
        graph_file=graph_file,
        variant=name,
        context_length=_context_length(path, config),
        vocabulary_size=None if vocabulary_size is None else config.number(config.content, "vocab_size"),
        pad_id=pad_id if isinstance(pad_id, int) and pad_id >= 0 else PAD_ID_DEFAULT,
        inputs=(),
        output="",
        pooling=None,
        is_normalized=True,
        is_lower_case=_optional_json(path, SENTENCE_CONFIG_FILE).get("do_lower_case") is True,
    )
    graph = read_graph_file(folder)
    output = _check_graph(folder, graph, config)
    modules = _modules(path)
    if output != POOLED:
        _check_modules(path, modules)
    _check_prompt(path)
    return replace(
        folder,
        inputs=tuple(graph.inputs),
        output=output,
        pooling=None if output == POOLED else _pooling(path),
        is_normalized=modules is None or "Normalize" in modules,
        precision=precision_of(graph),
        external_files=check_external_files(folder, graph),
    )


def load_embedding_model(folder: EmbeddingFolder) -> LoadedEmbeddingModel:
    """Load the tokenizer, and read every byte once for the fingerprint. Raises ModelFolderInvalid."""
    try:
        tokenizer = Tokenizer.from_file(folder.path / TOKENIZER_FILE)
    except TokenizerInvalid as exc:
        reason = f"{TOKENIZER_FILE} holds no tokenizer ({exc})"
        raise ModelFolderInvalid(folder.path, reason, "copy the folder again") from exc
    tokenizer.keep_lengths()
    vocabulary_size = folder.vocabulary_size or tokenizer.vocabulary_size
    if tokenizer.vocabulary_size > vocabulary_size:
        reason = (
            f"{TOKENIZER_FILE} has ids up to {tokenizer.vocabulary_size - 1}, "
            f"and the model's vocabulary ({HUGGING_FACE_CONFIG_FILE}) has {vocabulary_size}"
        )
        raise ModelFolderInvalid(folder.path, reason, "put the tokenizer there that belongs to the model")
    if folder.pad_id >= vocabulary_size:
        reason = (
            f"{HUGGING_FACE_CONFIG_FILE}: pad_token_id is {folder.pad_id}, and the vocabulary has {vocabulary_size}"
        )
        raise ModelFolderInvalid(folder.path, reason, "copy the folder again")
    decides = (folder.pooling, folder.output, folder.is_normalized, folder.is_lower_case, folder.context_length)
    try:
        weight_bytes = sum(file.stat().st_size for file in folder.weight_files())
        files = (*folder.weight_files(), folder.path / TOKENIZER_FILE)
        fingerprint = fingerprint_of_parts(files, (repr(decides).encode(),))
    except OSError as exc:
        reason = f"{Path(str(exc.filename)).name} cannot be read ({exc.strerror})"
        fix = "make it readable" if isinstance(exc, PermissionError) else "copy the folder again"
        raise ModelFolderInvalid(folder.path, reason, fix) from exc
    return LoadedEmbeddingModel(
        fingerprint, tokenizer, vocabulary_size, folder.context_length, folder.is_lower_case, weight_bytes
    )


def _choose(path: Path, variant: str | None, provider: Provider) -> tuple[str, Path]:
    found = find_variants(path)
    for name in PREFERENCES:
        if variant is None and name in found:
            return name, found[name]
    return choose_variant(path, variant, likely_processor(provider))


def _check_graph(folder: EmbeddingFolder, graph: OnnxFile, config: Fields) -> str:
    """The output to read. Raises ModelFolderInvalid."""

    def invalid(reason: str) -> ModelFolderInvalid:
        return ModelFolderInvalid(folder.path, f"{folder.graph_name} {reason}", EXPORT_FIX)

    for name in (INPUT_IDS, ATTENTION_MASK):
        if name not in graph.inputs:
            raise invalid(f"has no input {name}")
    for value in graph.inputs.values():
        if value.name not in INPUTS:
            raise invalid(f"has an input {value.name[:100]}, which no embedding model here is given")
        if value.element_type != onnx_file.INT64:
            raise invalid(f"has {value.name} of element type {value.element_type}, and {onnx_file.INT64} is served")
        if len(value.shape) != 2 or value.shape != (None, None):
            raise invalid(f"has {value.name} of the fixed shape {list(value.shape)}, and [batch, sequence] is served")
    model_type = config.content.get("model_type")
    if POSITION_IDS in graph.inputs and model_type in OFFSET_MODEL_TYPES:
        raise invalid(f"has an input {POSITION_IDS}, which a model of type {model_type} counts in its own way")
    name = next((name for name in (POOLED, *HIDDEN_STATES) if name in graph.outputs), "")
    if not name:
        raise invalid(f"has no output {POOLED} and none of {', '.join(HIDDEN_STATES)}")
    output = graph.outputs[name]
    if output.element_type not in FLOAT_TYPES:
        raise invalid(f"has {name} of element type {output.element_type}, and only float and float16 are served")
    dimensions = 2 if name == POOLED else 3
    if len(output.shape) not in (0, dimensions):
        raise invalid(f"has {name} of {len(output.shape)} dimensions, and {dimensions} are served")
    return name


def _context_length(path: Path, config: Fields) -> int:
    """What the author says of sentences; else of the tokenizer; never more than the model has positions for."""
    content = config.content
    positions = LENGTH_MAX
    if content.get("max_position_embeddings") is not None:
        positions = config.number(content, "max_position_embeddings")
        if content.get("model_type") in OFFSET_MODEL_TYPES:
            pad_id = content.get("pad_token_id")
            positions -= (pad_id if isinstance(pad_id, int) else 1) + 1
    wanted = _optional_json(path, SENTENCE_CONFIG_FILE).get("max_seq_length")
    if not _is_length(wanted):
        wanted = _optional_json(path, TOKENIZER_CONFIG_FILE).get("model_max_length")
    if _is_length(wanted):
        positions = min(positions, int(wanted))
    if not 0 < positions < LENGTH_MAX:
        raise config.invalid(
            f"max_position_embeddings is missing, and neither {SENTENCE_CONFIG_FILE} nor {TOKENIZER_CONFIG_FILE} says "
            "how many tokens an input may have"
        )
    return positions


def _is_length(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < LENGTH_MAX


def _optional_json(path: Path, name: str) -> dict[str, Any]:
    return read_json(path, name) if (path / name).is_file() else {}


def _modules(path: Path) -> list[str] | None:
    """The kinds of modules in their order, as their classes are called; None where there is no modules.json."""
    file = path / MODULES_FILE
    if not file.is_file():
        return None
    try:
        if file.stat().st_size > CONFIG_BYTES_MAX:
            raise ValueError(f"it is larger than {CONFIG_BYTES_MAX} bytes")
        content = json.loads(file.read_text(encoding="utf-8"))
        return [str(module["type"]).rpartition(".")[2] for module in content]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as exc:
        reason = f"{MODULES_FILE} is no list of modules with their types"
        raise ModelFolderInvalid(path, reason, "copy the folder again") from exc


def _check_modules(path: Path, modules: list[str] | None) -> None:
    """Raises ModelFolderInvalid for one that is computed neither by the graph nor here."""
    for kind in modules or ():
        if kind not in ("Transformer", "Pooling", "Normalize"):
            reason = f"{MODULES_FILE} has a module {kind[:100]!r}, and the graph ends before it"
            fix = f"export the whole model, so that the graph gives {POOLED}: `optimum-cli export onnx --library-name "
            raise ModelFolderInvalid(path, reason, fix + "sentence_transformers`")


def _pooling(path: Path) -> Pooling:
    if not (path / POOLING_FILE).is_file():
        return "mean"
    content = read_json(path, POOLING_FILE)
    modes = [key for key, value in content.items() if key.startswith("pooling_mode_") and value is True]
    if len(modes) != 1 or modes[0] not in POOLING_MODES:
        named = ", ".join(modes)[:200] or "none"
        reason = f"{POOLING_FILE} asks for {named}, and exactly one of {', '.join(POOLING_MODES)} is served"
        raise ModelFolderInvalid(path, reason, "choose another model")
    return POOLING_MODES[modes[0]]


def _check_prompt(path: Path) -> None:
    """A text put before every input by the author's library is no part of what this one does."""
    name = _optional_json(path, SENTENCE_TRANSFORMERS_FILE).get("default_prompt_name")
    if name is not None:
        reason = f"{SENTENCE_TRANSFORMERS_FILE} puts the prompt {str(name)[:100]!r} before every input"
        fix = "set default_prompt_name to null there, and let clients send the prompt with their inputs"
        raise ModelFolderInvalid(path, reason, fix)
