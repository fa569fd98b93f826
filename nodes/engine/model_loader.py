"""What a model folder says of itself, checked: numbers, files, precision, template, fingerprint. Loads no graph.

Two kinds of folder are read. What `python -m onnxruntime_genai.models.builder` writes: genai_config.json, model.onnx
and model.onnx.data. What optimum exports and repositories of such graphs hold: config.json, generation_config.json, and
one or more graphs in the folder or in onnx/. Both have tokenizer.json, tokenizer_config.json, and the chat template
there or in chat_template.jinja. How a graph is to be run is told by the graph, in nodes.engine.graph, not by the kind
of folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from nodes.engine.chat_template import ChatTemplate, ChatTemplateInvalid
from nodes.engine.devices import Provider, likely_processor
from nodes.engine.folder_files import read_chat_format
from nodes.engine.graph import check_external_files, precision_of, read_graph_file
from nodes.engine.model_configs import GENAI_CONFIG_FILE, HUGGING_FACE_CONFIG_FILE, GenaiConfig, HuggingFaceConfig
from nodes.engine.model_folder import BUILD_FIX, ModelFolder, ModelFolderInvalid, TensorNames
from nodes.engine.model_variants import choose_variant
from nodes.engine.tokenizer import Tokenizer, TokenizerInvalid

__all__ = [
    "BUILD_FIX",
    "LoadedModel",
    "ModelFolder",
    "ModelFolderInvalid",
    "TensorNames",
    "fingerprint_of",
    "load_model",
    "read_model_folder",
]

TOKENIZER_FILE = "tokenizer.json"
FINGERPRINT_HEX_CHARS = 32  # 128 bits: no two models of one cluster meet by chance
HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What an engine needs of a model beside its session. weight_bytes: on disk, and about that in memory.

    temperature, top_p: for requests that leave them open."""

    fingerprint: str
    eos_ids: frozenset[int]
    tokenizer: Tokenizer
    chat_template: ChatTemplate
    weight_bytes: int = 0
    temperature: float = 1.0
    top_p: float = 1.0


def read_model_folder(path: Path, variant: str | None = None, provider: Provider = "auto") -> ModelFolder:
    """Read and check what is quick to check: everything but weights and tokenizer. Raises ModelFolderInvalid.

    variant: which of several graphs, by name; None: in a folder with genai_config.json the one named there, else what
    the provider runs best (nodes.engine.model_variants says what that is)."""
    if not path.is_dir():
        reason = "it is a file, not a folder" if path.exists() else "there is no such folder"
        raise ModelFolderInvalid(path, reason, "give the path of a model's folder")
    folder = _read_configuration(path, variant, provider)
    for file in (folder.graph_file, path / TOKENIZER_FILE):
        if not file.is_file():
            raise ModelFolderInvalid(path, f"{file.relative_to(path).as_posix()} is missing", BUILD_FIX)
    graph = read_graph_file(folder)
    return replace(folder, precision=precision_of(graph), external_files=check_external_files(folder, graph))


def _read_configuration(path: Path, variant: str | None, provider: Provider) -> ModelFolder:
    if (path / GENAI_CONFIG_FILE).is_file():
        genai = GenaiConfig(path)
        chat = read_chat_format(path)
        if variant is None:
            return genai.folder(path / genai.graph_name(), "", chat)
        name, graph_file = choose_variant(path, variant, likely_processor(provider))
        return genai.folder(graph_file, name, chat)
    if not (path / HUGGING_FACE_CONFIG_FILE).is_file():
        reason = f"{GENAI_CONFIG_FILE} is missing, and so is {HUGGING_FACE_CONFIG_FILE}"
        raise ModelFolderInvalid(path, reason, BUILD_FIX)
    config = HuggingFaceConfig(path)
    chat = read_chat_format(path)
    processor = likely_processor(provider)
    name, graph_file = choose_variant(path, variant, processor)
    return replace(config.folder(graph_file, name, chat), chosen_for=processor if variant is None else None)


def load_model(folder: ModelFolder) -> LoadedModel:
    """Load tokenizer and template, and read every byte once for the fingerprint: takes seconds for gigabytes.

    Raises ModelFolderInvalid."""
    try:
        tokenizer = Tokenizer.from_file(folder.path / TOKENIZER_FILE)
    except TokenizerInvalid as exc:
        raise ModelFolderInvalid(folder.path, f"{TOKENIZER_FILE} holds no tokenizer ({exc})", BUILD_FIX) from exc
    if tokenizer.vocabulary_size > folder.vocabulary_size:
        reason = (
            f"{TOKENIZER_FILE} has ids up to {tokenizer.vocabulary_size - 1}, "
            f"and the model's vocabulary ({folder.config_file}) has {folder.vocabulary_size}"
        )
        raise ModelFolderInvalid(folder.path, reason, "put the tokenizer there that belongs to the model")
    try:
        template = ChatTemplate(
            folder.chat_template,
            bos_token=_spelling(folder.bos_token, tokenizer, [folder.bos_id]),
            eos_token=_spelling(folder.eos_token, tokenizer, sorted(folder.eos_ids)),
        )
    except ChatTemplateInvalid as exc:
        fix = "put the model's own template into chat_template.jinja"
        raise ModelFolderInvalid(folder.path, f"the chat template is no Jinja ({exc})", fix) from exc
    try:
        weight_bytes = sum(file.stat().st_size for file in folder.weight_files())
        fingerprint = fingerprint_of(folder)
    except OSError as exc:
        reason = f"{Path(str(exc.filename)).name} cannot be read ({exc.strerror})"
        fix = "make it readable" if isinstance(exc, PermissionError) else BUILD_FIX
        raise ModelFolderInvalid(folder.path, reason, fix) from exc
    return LoadedModel(fingerprint, folder.eos_ids, tokenizer, template, weight_bytes, folder.temperature, folder.top_p)


def fingerprint_of(folder: ModelFolder) -> str:
    """Hash, as hex, of what decides which text a prompt gets: weights, tokenizer, template, end-of-sequence ids.

    Raises OSError."""
    template = folder.chat_template.encode("utf-8", "surrogatepass")
    files = (*folder.weight_files(), folder.path / TOKENIZER_FILE)
    return fingerprint_of_parts(files, (template, repr(sorted(folder.eos_ids)).encode()))


def fingerprint_of_parts(files: Iterable[Path], parts: Iterable[bytes]) -> str:
    """Hash, as hex, of the contents of files and of other things. Raises OSError."""
    total = hashlib.sha256()
    for file in files:
        content = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(HASH_BLOCK_BYTES):
                content.update(block)
        total.update(content.digest())
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()[:FINGERPRINT_HEX_CHARS]


def _spelling(configured: str | None, tokenizer: Tokenizer, token_ids: list[int | None] | list[int]) -> str:
    if configured is not None:
        return configured
    token_id = next(iter(token_ids), None)
    return "" if token_id is None else tokenizer.token(token_id) or ""
