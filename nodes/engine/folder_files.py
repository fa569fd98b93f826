"""The small files of a model folder, read with bounds and checked field by field: each failure names file and field."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nodes.engine.model_folder import BUILD_FIX, ModelFolderInvalid

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
# A configuration beyond this is none: real ones have a few kilobytes, templates included.
CONFIG_BYTES_MAX = 4 * 1024 * 1024


class Fields:
    """One JSON file of a folder. The methods raise ModelFolderInvalid, which names the field with its prefix."""

    def __init__(self, path: Path, file: str) -> None:
        self.path = path
        self.file = file
        self.content = read_json(path, file)

    def table(self, parent: dict[str, Any], key: str, prefix: str = "") -> dict[str, Any]:
        value = parent.get(key)
        if not isinstance(value, dict):
            raise self.invalid(f"{prefix}{key} is missing")
        return value

    def number(self, table: dict[str, Any], key: str, prefix: str = "") -> int:
        """A positive integer."""
        value = table.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.invalid(f"{prefix}{key} is {'missing' if value is None else 'no positive integer'}")
        return value

    def fraction(self, table: dict[str, Any], key: str, least: float, most: float, prefix: str = "") -> float:
        """A number, 1.0 where it is absent."""
        value = table.get(key)
        if value is None:
            return 1.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise self.invalid(f"{prefix}{key} is no number from {least:g} to {most:g}")
        return float(value)

    def token_ids(self, table: dict[str, Any], key: str, vocabulary_size: int, prefix: str = "") -> frozenset[int]:
        """An id or a list of ids."""
        value = table.get(key)
        ids = value if isinstance(value, list) else [value]
        if not ids or not all(isinstance(token_id, int) and 0 <= token_id < vocabulary_size for token_id in ids):
            raise self.invalid(
                f"{prefix}{key} is neither an id nor a list of ids below the vocabulary's {vocabulary_size}"
            )
        return frozenset(ids)

    def invalid(self, reason: str) -> ModelFolderInvalid:
        return ModelFolderInvalid(self.path, f"{self.file}: {reason}", BUILD_FIX)


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How conversations are written for the model. bos_token, eos_token: None where the configuration is silent."""

    bos_token: str | None
    eos_token: str | None
    template: str


def read_chat_format(path: Path) -> ChatFormat:
    """From chat_template.jinja and the tokenizer configuration. Raises ModelFolderInvalid."""
    config = read_json(path, TOKENIZER_CONFIG_FILE) if (path / TOKENIZER_CONFIG_FILE).exists() else {}
    return ChatFormat(
        bos_token=_token_text(config.get("bos_token")),
        eos_token=_token_text(config.get("eos_token")),
        template=_chat_template(path, config),
    )


def read_json(path: Path, name: str) -> dict[str, Any]:
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
            if file.stat().st_size > CONFIG_BYTES_MAX:
                raise ModelFolderInvalid(path, f"{TEMPLATE_FILE} is larger than {CONFIG_BYTES_MAX} bytes", BUILD_FIX)
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise ModelFolderInvalid(path, f"{TEMPLATE_FILE} cannot be read as UTF-8 text", BUILD_FIX) from exc
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        where = (
            ""
            if (path / TOKENIZER_CONFIG_FILE).exists()
            else f": neither {TEMPLATE_FILE} nor {TOKENIZER_CONFIG_FILE} is there"
        )
        raise ModelFolderInvalid(
            path, f"it has no chat template{where}", f"add the model's template as {TEMPLATE_FILE}"
        )
    return template


def _token_text(value: object) -> str | None:
    """A token in the tokenizer configuration is a string or an object with its content."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None
