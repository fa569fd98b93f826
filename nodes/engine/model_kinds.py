"""The two kinds of models that nodes serve, told apart by the graph: language models, and embedding models."""

from __future__ import annotations

from pathlib import Path

from nodes.engine.devices import Provider
from nodes.engine.embedding_folder import EmbeddingFolder, is_embedding_folder, read_embedding_folder
from nodes.engine.model_folder import ModelFolder
from nodes.engine.model_loader import read_model_folder

AnyFolder = ModelFolder | EmbeddingFolder


def read_folder(path: Path, variant: str | None = None, provider: Provider = "auto") -> AnyFolder:
    """Read and check what is quick to check, of a folder of either kind. Raises ModelFolderInvalid.

    variant: which of several graphs, by name; None: what runs best."""
    if is_embedding_folder(path):
        return read_embedding_folder(path, variant, provider)
    return read_model_folder(path, variant, provider)
