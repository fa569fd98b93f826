"""Reads a model folder in onnxruntime-genai's format and refuses what cannot work, with the file and the reason.

The graph itself is read by session.py; here is all that is known without ONNX Runtime.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nodes.engine.chat_template import ChatTemplate, ChatTemplateError
from nodes.engine.tokenizer import Tokenizer

# A slot of a long-context model would take gigabytes; whoever needs more says so with --capacity.
CAPACITY_DEFAULT_MAX = 8192
FINGERPRINT_CHARS = 16
_READ_BYTES = 1 << 20
_MAKE_ONE = "make one with onnxruntime-genai's model builder"


class ModelFolderInvalid(Exception):
    """A model folder that cannot be served. One line: the folder, the file at fault, the reason and the fix."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(f"model folder {folder}: {reason}")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder that has been checked. weight_files: the graph and what it keeps outside, for size and fingerprint."""

    path: Path
    graph: Path
    layers: int
    kv_heads: int
    head_size: int
    vocabulary_size: int
    context_length: int
    eos_token_ids: frozenset[int]
    past_key: str  # name of a graph input, with %d for the layer
    past_value: str
    present_key: str
    present_value: str
    tokenizer: Tokenizer
    template: ChatTemplate
    weight_files: tuple[Path, ...]

    def weight_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.weight_files)

    def fingerprint(self) -> str:
        """Hash of weights, tokenizer and template, as hex. Reads all of them: about a second per gigabyte."""
        digest = hashlib.sha256()
        for file in (*self.weight_files, *_text_files(self.path)):
            with open(file, "rb") as handle:
                while block := handle.read(_READ_BYTES):
                    digest.update(block)
        return digest.hexdigest()[:FINGERPRINT_CHARS]


def read_model_folder(path: Path) -> ModelFolder:
    """Raises ModelFolderInvalid."""
    if not path.is_dir():
        reason = "is no folder" if path.exists() else "does not exist"
        raise ModelFolderInvalid(path, f"it {reason}; give --model the folder that holds genai_config.json")
    config = _read_json(path, "genai_config.json")
    try:
        model = config["model"]
        decoder = model["decoder"]
        inputs, outputs = decoder.get("inputs", {}), decoder.get("outputs", {})
        graph = path / str(decoder.get("filename", "model.onnx"))
        eos = model["eos_token_id"]
        fields: dict[str, Any] = {
            "layers": int(decoder["num_hidden_layers"]),
            "kv_heads": int(decoder["num_key_value_heads"]),
            "head_size": int(decoder["head_size"]),
            "vocabulary_size": int(model["vocab_size"]),
            "context_length": int(model["context_length"]),
            "eos_token_ids": frozenset(int(e) for e in (eos if isinstance(eos, list) else [eos])),
            "past_key": str(inputs.get("past_key_names", "past_key_values.%d.key")),
            "past_value": str(inputs.get("past_value_names", "past_key_values.%d.value")),
            "present_key": str(outputs.get("present_key_names", "present.%d.key")),
            "present_value": str(outputs.get("present_value_names", "present.%d.value")),
        }
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise ModelFolderInvalid(path, f"genai_config.json lacks or misstates {exc}; {_MAKE_ONE}") from exc
    _check_inside(path, graph)
    tokenizer = _read_tokenizer(path)
    if tokenizer.vocabulary_size > fields["vocabulary_size"]:
        raise ModelFolderInvalid(
            path,
            f"tokenizer.json has {tokenizer.vocabulary_size} tokens and the model {fields['vocabulary_size']}; "
            "they belong to different models",
        )
    external = sorted(file for file in path.glob(graph.name + ".*") if file.is_file())
    template = _read_template(path, tokenizer, model)
    return ModelFolder(path, graph, **fields, tokenizer=tokenizer, template=template, weight_files=(graph, *external))


def _check_inside(path: Path, graph: Path) -> None:
    if path.resolve() not in graph.resolve().parents:
        raise ModelFolderInvalid(path, f"genai_config.json names {graph}, which is outside the folder")
    if not graph.is_file():
        raise ModelFolderInvalid(path, f"{graph.name} is missing; {_MAKE_ONE}")


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((path / name).read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise ModelFolderInvalid(path, f"{name} is missing; {_MAKE_ONE}") from exc
    except (OSError, ValueError) as exc:
        raise ModelFolderInvalid(path, f"{name} is no JSON: {exc}") from exc
    if not isinstance(content, dict):
        raise ModelFolderInvalid(path, f"{name} holds no object")
    return content


def _read_tokenizer(path: Path) -> Tokenizer:
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ModelFolderInvalid(path, f"tokenizer.json is missing; {_MAKE_ONE}")
    try:
        return Tokenizer(file)
    except Exception as exc:  # the tokenizers package raises plain Exception
        raise ModelFolderInvalid(path, f"tokenizer.json is no tokenizer: {str(exc)[:200]}") from exc


def _read_template(path: Path, tokenizer: Tokenizer, model: dict[str, Any]) -> ChatTemplate:
    config = _read_json(path, "tokenizer_config.json")
    file = path / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if not isinstance(source, str):
        raise ModelFolderInvalid(path, "neither chat_template.jinja nor tokenizer_config.json holds a chat template")
    tokens = {name: _token(config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    if not tokens["bos_token"] and isinstance(model.get("bos_token_id"), int):
        tokens["bos_token"] = tokenizer.token(model["bos_token_id"]) or ""
    try:
        return ChatTemplate(source, tokens)
    except ChatTemplateError as exc:
        raise ModelFolderInvalid(path, str(exc)) from exc


def _token(value: object) -> str:
    """A special token as tokenizer_config.json has it: a string, an object with "content", or null."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _text_files(path: Path) -> list[Path]:
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    return [path / name for name in names if (path / name).is_file()]
