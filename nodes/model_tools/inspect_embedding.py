"""What is in the folder of an embedding model, and whether a node can serve it: read, loaded, run on two texts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nodes.engine.devices import Provider
from nodes.engine.embedding_folder import (
    EmbeddingFolder,
    LoadedEmbeddingModel,
    load_embedding_model,
    read_embedding_folder,
)
from nodes.engine.embedding_session import load_embedding_session
from nodes.engine.model_folder import ModelFolderInvalid

CHECK_TEXTS = ("Hello! Who are you?", "The river is high after the rain.")


@dataclass(frozen=True, slots=True)
class EmbeddingFacts:
    """What reading tells. weight_bytes: on disk."""

    folder: EmbeddingFolder
    weight_bytes: int

    @property
    def pooling(self) -> str:
        how = self.folder.pooling or "by the graph"
        return f"{how}, {'length 1' if self.folder.is_normalized else 'as it comes'}"


@dataclass(frozen=True, slots=True)
class EmbeddingRun:
    """What CHECK_TEXTS gave. similarity: the cosine of their vectors."""

    dimensions: int
    load_time_s: float
    seconds: float
    similarity: float
    is_batched: bool


def read_embedding_facts(path: Path, variant: str | None = None, provider: Provider = "auto") -> EmbeddingFacts:
    """All but tokenizer and weights. Raises ModelFolderInvalid."""
    folder = read_embedding_folder(path, variant, provider)
    try:
        return EmbeddingFacts(folder, sum(file.stat().st_size for file in folder.weight_files()))
    except OSError as exc:
        raise ModelFolderInvalid(path, f"{exc.filename} cannot be read ({exc.strerror})", "make it readable") from exc


def load_embedding_facts(facts: EmbeddingFacts) -> LoadedEmbeddingModel:
    """Tokenizer and fingerprint, which reads every byte. Raises ModelFolderInvalid."""
    return load_embedding_model(facts.folder)


def run_embedding_model(
    facts: EmbeddingFacts, model: LoadedEmbeddingModel, *, provider: Provider, threads: int
) -> EmbeddingRun:
    """Load the graph as a node does, and compute two vectors. Raises ModelFolderInvalid."""
    started = time.monotonic()
    session = load_embedding_session(facts.folder, threads=threads, provider=provider)
    loaded = time.monotonic()
    inputs = [np.array(model.encode(text)[: model.context_length], np.int64) for text in CHECK_TEXTS]
    first, second = (session.embed([ids])[0].astype(np.float64) for ids in inputs)
    return EmbeddingRun(
        dimensions=session.dimensions,
        load_time_s=loaded - started,
        seconds=time.monotonic() - loaded,
        similarity=float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second))),
        is_batched=session.rows_max > 1,
    )
