"""What is known of a model folder once it was read. Data only; nodes.engine.model_loader reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nodes.engine.devices import Processor

BUILD_FIX = "build the folder with `ai-cluster models build`, or copy it again"


class ModelFolderInvalid(Exception):
    """The folder holds no model that this engine can serve. One line: which thing is wrong, why, and the fix."""

    def __init__(self, path: Path, reason: str, fix: str) -> None:
        super().__init__(" ".join(f"model folder {path}: {reason}; {fix}".split()))
        self.path = path
        self.reason = reason
        self.fix = fix


class GraphPlace(Protocol):
    """Where a graph is: of a language model's folder, or of an embedding model's."""

    @property
    def path(self) -> Path: ...
    @property
    def graph_file(self) -> Path: ...
    @property
    def graph_name(self) -> str: ...


@dataclass(frozen=True, slots=True)
class TensorNames:
    """What the graph calls its tensors; the four patterns hold `%d` for the layer."""

    input_ids: str = "input_ids"
    attention_mask: str = "attention_mask"
    position_ids: str = "position_ids"
    past_key: str = "past_key_values.%d.key"
    past_value: str = "past_key_values.%d.value"
    logits: str = "logits"
    present_key: str = "present.%d.key"
    present_value: str = "present.%d.value"


@dataclass(frozen=True, slots=True)
class Precision:
    """How a graph's weights are kept. kind: fp32, fp16, bf16, int8, int4 or another width. block_size: weights that
    share a scale, None where they are not quantised or the graph does not say."""

    kind: str
    block_size: int | None = None

    def __str__(self) -> str:
        return self.kind if self.block_size is None else f"{self.kind} block {self.block_size}"


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """The configuration of one folder. Lengths in tokens.

    graph_file: the variant that was chosen; variant: its name, "" for model.onnx. chosen_for: where it runs best, None
    where nothing was to choose or the variant was named. external_files: with more of its
    weights. config_file: the file in `path` that the numbers are from. sliding_window: KV rows that the model's
    attention looks back, None for all. bos_token, eos_token: as the tokenizer configuration spells them, None where it
    does not. temperature, top_p: for requests that leave them open.
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
    config_file: str = "genai_config.json"
    variant: str = ""
    chosen_for: Processor | None = None
    precision: Precision = Precision("fp32")
    external_files: tuple[Path, ...] = ()

    @property
    def graph_name(self) -> str:
        """The graph's file as messages name it: relative to the folder."""
        return name_in(self.path, self.graph_file)

    def weight_files(self) -> list[Path]:
        """The graph, then the files of external data, by name."""
        return [self.graph_file, *self.external_files]


def name_in(path: Path, file: Path) -> str:
    """The file as messages name it: relative to the folder."""
    return file.relative_to(path).as_posix() if file.is_relative_to(path) else file.name
