"""The numbers of a model, from either of the two files that folders have: genai_config.json or config.json.

genai_config.json is what `python -m onnxruntime_genai.models.builder` writes; it names the graph's tensors. config.json
is Hugging Face's, beside graphs that optimum exports; their tensors have the names that optimum gives them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nodes.engine.folder_files import ChatFormat, Fields
from nodes.engine.model_folder import ModelFolder, TensorNames

GENAI_CONFIG_FILE = "genai_config.json"
HUGGING_FACE_CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"


class GenaiConfig:
    def __init__(self, path: Path) -> None:
        """Raises ModelFolderInvalid, as the methods do."""
        self._fields = Fields(path, GENAI_CONFIG_FILE)
        self._model = self._fields.table(self._fields.content, "model")
        self._decoder = self._fields.table(self._model, "decoder", "model.")

    def graph_name(self) -> str:
        value = self._decoder.get("filename", "model.onnx")
        if not isinstance(value, str) or Path(value).name != value or not value:
            raise self._fields.invalid("model.decoder.filename is no name of a file in the folder")
        return value

    def folder(self, graph_file: Path, variant: str, chat: ChatFormat) -> ModelFolder:
        fields, model, decoder = self._fields, self._model, self._decoder
        window = decoder.get("sliding_window")
        search = fields.content.get("search")
        temperature, top_p = _sampling(fields, search if isinstance(search, dict) else {}, "search.")
        vocabulary_size = fields.number(model, "vocab_size", "model.")
        return ModelFolder(
            path=fields.path,
            graph_file=graph_file,
            layers=fields.number(decoder, "num_hidden_layers", "model.decoder."),
            kv_heads=fields.number(decoder, "num_key_value_heads", "model.decoder."),
            head_size=fields.number(decoder, "head_size", "model.decoder."),
            vocabulary_size=vocabulary_size,
            context_length=fields.number(model, "context_length", "model."),
            sliding_window=(
                fields.number(window, "window_size", "model.decoder.sliding_window.")
                if isinstance(window, dict)
                else None
            ),
            bos_id=_single_id(model),
            eos_ids=fields.token_ids(model, "eos_token_id", vocabulary_size, "model."),
            bos_token=chat.bos_token,
            eos_token=chat.eos_token,
            chat_template=chat.template,
            tensors=self._tensors(),
            temperature=temperature,
            top_p=top_p,
            config_file=GENAI_CONFIG_FILE,
            variant=variant,
        )

    def _tensors(self) -> TensorNames:
        inputs, outputs = self._decoder.get("inputs", {}), self._decoder.get("outputs", {})
        default = TensorNames()
        names = TensorNames(
            input_ids=str(inputs.get("input_ids", default.input_ids)),
            attention_mask=str(inputs.get("attention_mask", default.attention_mask)),
            position_ids=str(inputs.get("position_ids", default.position_ids)),
            past_key=str(inputs.get("past_key_names", default.past_key)),
            past_value=str(inputs.get("past_value_names", default.past_value)),
            logits=str(outputs.get("logits", default.logits)),
            present_key=str(outputs.get("present_key_names", default.present_key)),
            present_value=str(outputs.get("present_value_names", default.present_value)),
        )
        for pattern in (names.past_key, names.past_value, names.present_key, names.present_value):
            if pattern.count("%") != 1 or "%d" not in pattern:
                raise self._fields.invalid(f"the tensor name {pattern!r} does not hold %d for the layer")
        return names


class HuggingFaceConfig:
    def __init__(self, path: Path) -> None:
        """Raises ModelFolderInvalid, as the methods do."""
        self._fields = Fields(path, HUGGING_FACE_CONFIG_FILE)
        # Of a model that also sees or hears, what is said of its language model.
        text = self._fields.content.get("text_config")
        self._config: dict[str, Any] = text if isinstance(text, dict) else self._fields.content
        has_generation = (path / GENERATION_CONFIG_FILE).exists()
        self._generation = Fields(path, GENERATION_CONFIG_FILE) if has_generation else None

    def folder(self, graph_file: Path, variant: str, chat: ChatFormat) -> ModelFolder:
        fields, config = self._fields, self._config
        heads = fields.number(config, "num_attention_heads")
        generation = self._generation or fields
        generation_content = self._generation.content if self._generation else {}
        temperature, top_p = _sampling(generation, generation_content, "")
        vocabulary_size = fields.number(config, "vocab_size")
        return ModelFolder(
            path=fields.path,
            graph_file=graph_file,
            layers=fields.number(config, "num_hidden_layers"),
            kv_heads=heads
            if config.get("num_key_value_heads") is None
            else fields.number(config, "num_key_value_heads"),
            head_size=(
                fields.number(config, "hidden_size") // heads
                if config.get("head_dim") is None
                else fields.number(config, "head_dim")
            ),
            vocabulary_size=vocabulary_size,
            context_length=fields.number(config, "max_position_embeddings"),
            sliding_window=None if config.get("use_sliding_window") is False else self._optional("sliding_window"),
            bos_id=_single_id(config),
            eos_ids=self._eos_ids(vocabulary_size),
            bos_token=chat.bos_token,
            eos_token=chat.eos_token,
            chat_template=chat.template,
            tensors=TensorNames(),
            temperature=temperature,
            top_p=top_p,
            config_file=HUGGING_FACE_CONFIG_FILE,
            variant=variant,
        )

    def _eos_ids(self, vocabulary_size: int) -> frozenset[int]:
        """The generation configuration has the chat's end beside the text's, where config.json has the text's only."""
        if self._generation is not None and self._generation.content.get("eos_token_id") is not None:
            return self._generation.token_ids(self._generation.content, "eos_token_id", vocabulary_size)
        return self._fields.token_ids(self._config, "eos_token_id", vocabulary_size)

    def _optional(self, key: str) -> int | None:
        return None if self._config.get(key) is None else self._fields.number(self._config, key)


def _sampling(fields: Fields, table: dict[str, Any], prefix: str) -> tuple[float, float]:
    """Temperature and top_p of requests that leave them open. Greedy where the model's author left sampling off, as
    onnxruntime-genai does."""
    is_sampled = bool(table.get("do_sample", True))
    temperature = fields.fraction(table, "temperature", 0.0, 2.0, prefix) if is_sampled else 0.0
    return temperature, fields.fraction(table, "top_p", 0.0, 1.0, prefix)


def _single_id(table: dict[str, Any]) -> int | None:
    value = table.get("bos_token_id")
    return value if isinstance(value, int) and not isinstance(value, bool) else None
