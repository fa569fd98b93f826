"""What a model folder says of itself, checked: numbers, files, template, fingerprint. Loads no graph.

A folder is what `python -m onnxruntime_genai.models.builder` writes: genai_config.json, model.onnx and model.onnx.data,
tokenizer.json, tokenizer_config.json, and the chat template there or in chat_template.jinja.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nodes.engine.chat_template import ChatTemplate, ChatTemplateInvalid
from nodes.engine.tokenizer import Tokenizer, TokenizerInvalid

CONFIG_FILE = "genai_config.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
FINGERPRINT_HEX_CHARS = 32  # 128 bits: no two models of one cluster meet by chance
HASH_BLOCK_BYTES = 1 << 20
# A configuration beyond this is none: real ones have a few kilobytes, templates included.
CONFIG_BYTES_MAX = 4 * 1024 * 1024
BUILD_FIX = "build the folder with `python -m onnxruntime_genai.models.builder`, or copy it again"


class ModelFolderInvalid(Exception):
    """The folder holds no model that this engine can serve. One line: which thing is wrong, why, and the fix."""

    def __init__(self, path: Path, reason: str, fix: str) -> None:
        super().__init__(" ".join(f"model folder {path}: {reason}; {fix}".split()))
        self.path = path
        self.reason = reason
        self.fix = fix


@dataclass(frozen=True, slots=True)
class TensorNames:
    """What the graph calls its tensors; the four patterns hold `%d` for the layer."""

    input_ids: str = "input_ids"
    attention_mask: str = "attention_mask"
    past_key: str = "past_key_values.%d.key"
    past_value: str = "past_key_values.%d.value"
    logits: str = "logits"
    present_key: str = "present.%d.key"
    present_value: str = "present.%d.value"


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """The configuration of one folder. Lengths in tokens.

    sliding_window: KV rows that the model's attention looks back, None for all. bos_token, eos_token: as the tokenizer
    configuration spells them, None where it does not. temperature, top_p: for requests that leave them open.
    """

    path: Path
    graph_file: Path
    layers: int
    kv_heads: int
    head_size: int
    vocabulary_size: int
    context_length: int
    sliding_window: int | None
    bos_id: int | None
    eos_ids: frozenset[int]
    bos_token: str | None
    eos_token: str | None
    chat_template: str
    tensors: TensorNames
    temperature: float
    top_p: float

    def weight_files(self) -> list[Path]:
        """The graph and the files of external data beside it, which start with its name."""
        return sorted(file for file in self.path.glob(f"{self.graph_file.name}*") if file.is_file())


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


def read_model_folder(path: Path) -> ModelFolder:
    """Read and check what is quick to check. Raises ModelFolderInvalid."""
    if not path.is_dir():
        reason = "it is a file, not a folder" if path.exists() else "there is no such folder"
        raise ModelFolderInvalid(path, reason, "pass the folder of a model with --model FOLDER")
    config = _read_json(path, CONFIG_FILE)
    reader = _ConfigReader(path, config)
    folder = reader.folder()
    for file in (folder.graph_file.name, TOKENIZER_FILE):
        if not (path / file).is_file():
            raise ModelFolderInvalid(path, f"{file} is missing", BUILD_FIX)
    return folder


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
            f"and the model's vocabulary ({CONFIG_FILE}) has {folder.vocabulary_size}"
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
        raise ModelFolderInvalid(folder.path, reason, BUILD_FIX) from exc
    return LoadedModel(fingerprint, folder.eos_ids, tokenizer, template, weight_bytes, folder.temperature, folder.top_p)


def fingerprint_of(folder: ModelFolder) -> str:
    """Hash, as hex, of what decides which text a prompt gets: weights, tokenizer, template, end-of-sequence ids.

    Raises OSError."""
    total = hashlib.sha256()
    for file in (*folder.weight_files(), folder.path / TOKENIZER_FILE):
        content = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(HASH_BLOCK_BYTES):
                content.update(block)
        total.update(content.digest())
    template = folder.chat_template.encode("utf-8", "surrogatepass")
    for part in (template, repr(sorted(folder.eos_ids)).encode()):
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()[:FINGERPRINT_HEX_CHARS]


class _ConfigReader:
    """Reads genai_config.json field by field; each failure names the field."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self._path = path
        self._model = self._table(config, "model", "")
        self._decoder = self._table(self._model, "decoder", "model.")
        search = config.get("search")
        self._search: dict[str, Any] = search if isinstance(search, dict) else {}

    def folder(self) -> ModelFolder:
        path, model, decoder = self._path, self._model, self._decoder
        tokenizer_config = _read_json(path, TOKENIZER_CONFIG_FILE) if (path / TOKENIZER_CONFIG_FILE).exists() else {}
        window = decoder.get("sliding_window")
        return ModelFolder(
            path=path,
            graph_file=path / self._file_name(decoder.get("filename", "model.onnx")),
            layers=self._number(decoder, "num_hidden_layers", "model.decoder."),
            kv_heads=self._number(decoder, "num_key_value_heads", "model.decoder."),
            head_size=self._number(decoder, "head_size", "model.decoder."),
            vocabulary_size=self._number(model, "vocab_size", "model."),
            context_length=self._number(model, "context_length", "model."),
            sliding_window=(
                self._number(window, "window_size", "model.decoder.sliding_window.")
                if isinstance(window, dict)
                else None
            ),
            bos_id=model["bos_token_id"] if isinstance(model.get("bos_token_id"), int) else None,
            eos_ids=self._eos_ids(),
            bos_token=_token_text(tokenizer_config.get("bos_token")),
            eos_token=_token_text(tokenizer_config.get("eos_token")),
            chat_template=_chat_template(path, tokenizer_config),
            tensors=self._tensors(),
            # Greedy where the model's author left sampling off, as onnxruntime-genai does.
            temperature=self._search_number("temperature", 0.0, 2.0) if self._search.get("do_sample", True) else 0.0,
            top_p=self._search_number("top_p", 0.0, 1.0),
        )

    def _eos_ids(self) -> frozenset[int]:
        value = self._model.get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        vocabulary_size = self._number(self._model, "vocab_size", "model.")
        if not ids or not all(isinstance(token_id, int) and 0 <= token_id < vocabulary_size for token_id in ids):
            raise self._invalid(
                f"model.eos_token_id is neither an id nor a list of ids below the vocabulary's {vocabulary_size}"
            )
        return frozenset(ids)

    def _tensors(self) -> TensorNames:
        inputs, outputs = self._decoder.get("inputs", {}), self._decoder.get("outputs", {})
        default = TensorNames()
        names = TensorNames(
            input_ids=str(inputs.get("input_ids", default.input_ids)),
            attention_mask=str(inputs.get("attention_mask", default.attention_mask)),
            past_key=str(inputs.get("past_key_names", default.past_key)),
            past_value=str(inputs.get("past_value_names", default.past_value)),
            logits=str(outputs.get("logits", default.logits)),
            present_key=str(outputs.get("present_key_names", default.present_key)),
            present_value=str(outputs.get("present_value_names", default.present_value)),
        )
        for pattern in (names.past_key, names.past_value, names.present_key, names.present_value):
            if pattern.count("%") != 1 or "%d" not in pattern:
                raise self._invalid(f"the tensor name {pattern!r} does not hold %d for the layer")
        return names

    def _file_name(self, value: object) -> str:
        if not isinstance(value, str) or Path(value).name != value or not value:
            raise self._invalid("model.decoder.filename is no name of a file in the folder")
        return value

    def _table(self, parent: dict[str, Any], key: str, prefix: str) -> dict[str, Any]:
        value = parent.get(key)
        if not isinstance(value, dict):
            raise self._invalid(f"{prefix}{key} is missing")
        return value

    def _number(self, table: dict[str, Any], key: str, prefix: str) -> int:
        value = table.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self._invalid(f"{prefix}{key} is {'missing' if value is None else 'no positive integer'}")
        return value

    def _search_number(self, key: str, least: float, most: float) -> float:
        """search.KEY, 1.0 where it is absent."""
        value = self._search.get(key, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise self._invalid(f"search.{key} is no number from {least:g} to {most:g}")
        return float(value)

    def _invalid(self, reason: str) -> ModelFolderInvalid:
        return ModelFolderInvalid(self._path, f"{CONFIG_FILE}: {reason}", BUILD_FIX)


def _read_json(path: Path, name: str) -> dict[str, Any]:
    file = path / name
    if not file.is_file():
        raise ModelFolderInvalid(path, f"{name} is missing", BUILD_FIX)
    try:
        if file.stat().st_size > CONFIG_BYTES_MAX:
            raise ModelFolderInvalid(path, f"{name} is larger than {CONFIG_BYTES_MAX} bytes", BUILD_FIX)
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ModelFolderInvalid(path, f"{name} cannot be read ({exc.strerror})", "make it readable") from exc
    except (ValueError, RecursionError) as exc:
        raise ModelFolderInvalid(path, f"{name} is no JSON", BUILD_FIX) from exc
    if not isinstance(content, dict):
        raise ModelFolderInvalid(path, f"{name} holds no JSON object", BUILD_FIX)
    return content


def _chat_template(path: Path, tokenizer_config: dict[str, Any]) -> str:
    """From chat_template.jinja, else from the tokenizer configuration: one text, or several of which one is default."""
    file = path / TEMPLATE_FILE
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise ModelFolderInvalid(path, f"{TEMPLATE_FILE} cannot be read as UTF-8 text", BUILD_FIX) from exc
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise ModelFolderInvalid(path, "it has no chat template", f"add the model's template as {TEMPLATE_FILE}")
    return template


def _token_text(value: object) -> str | None:
    """A token in the tokenizer configuration is a string or an object with its content."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _spelling(configured: str | None, tokenizer: Tokenizer, token_ids: list[int | None] | list[int]) -> str:
    if configured is not None:
        return configured
    token_id = next(iter(token_ids), None)
    return "" if token_id is None else tokenizer.token(token_id) or ""
