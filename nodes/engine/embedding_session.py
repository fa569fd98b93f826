"""Runs the graph of an embedding model: token ids of several inputs in, one vector of each out.

Inputs of a batch are padded to the longest one. That padding and neighbours change nothing is tried when the graph is
loaded; a graph for which they do, as one that quantises a whole batch by one scale, is given its inputs one at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from nodes.engine import memory
from nodes.engine.cuda import (
    CUDA,
    INSTALL_FIX,
    LOG_FATAL_ONLY,
    DeviceUnavailable,
    cannot_run,
    prepare_cuda,
    provider_options,
)
from nodes.engine.devices import Provider
from nodes.engine.embedding_folder import (
    ATTENTION_MASK,
    EXPORT_FIX,
    INPUT_IDS,
    POSITION_IDS,
    TOKEN_TYPE_IDS,
    EmbeddingFolder,
)
from nodes.engine.model_folder import ModelFolderInvalid
from nodes.engine.pooling import FloatArray, normalized, pool
from nodes.engine.priority import call_making_way

logger = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int64]

CPU = "CPUExecutionProvider"
# Inputs of one step. On the CPU a step of some thousand tokens has all cores busy; a device wants more of them.
ROWS_MAX = 64
STEP_TOKENS = {"cpu": 4_096, "cuda": 32_768}
COMPLAINT_CHARS_MAX = 200
# Lengths of the inputs by which the graph is tried, and what a batch may change of a vector that has length 1.
TRIAL_TOKENS = (7, 3, 5)
DRIFT_MAX = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-2}
MEMORY_FIX = "free memory, or take a smaller variant of the model"


class EmbeddingSession:
    """device: cpu or cuda. dimensions: of a vector. rows_max, step_tokens: inputs of one embed(), and tokens of it with
    padding; a single input may have more. Used by one thread at a time."""

    def __init__(self, session: Any, folder: EmbeddingFolder, device: str) -> None:
        """Runs the graph. Raises ModelFolderInvalid where it gives no vectors."""
        self.device = device
        self.rows_max = ROWS_MAX
        self.step_tokens = STEP_TOKENS[device]
        self._session = session
        self._folder = folder
        lengths = [min(length, folder.context_length) for length in TRIAL_TOKENS]
        trial = [np.arange(length, dtype=np.int64) % (folder.vocabulary_size or 1) for length in lengths]
        alone = np.concatenate([self.embed([ids]) for ids in trial])
        self.dimensions = alone.shape[1]
        if not np.isfinite(alone).all():
            reason = f"{folder.graph_name} gives numbers that are none"
            raise ModelFolderInvalid(folder.path, reason, EXPORT_FIX)
        if not self._is_steady(trial, alone):
            self.rows_max = 1
            logger.warning(
                "an input's embedding depends on the others of a batch; each is computed alone",
                extra={"graph": folder.graph_name, "precision": str(folder.precision)},
            )

    def embed(self, inputs: Sequence[IntArray]) -> FloatArray:
        """float32 [inputs, dimensions], in their order."""
        longest = max(len(ids) for ids in inputs)
        input_ids = np.full((len(inputs), longest), self._folder.pad_id, np.int64)
        mask = np.zeros_like(input_ids)
        for row, ids in enumerate(inputs):
            input_ids[row, : len(ids)] = ids
            mask[row, : len(ids)] = 1
        values = {
            INPUT_IDS: input_ids,
            ATTENTION_MASK: mask,
            TOKEN_TYPE_IDS: np.zeros_like(input_ids),
            POSITION_IDS: np.broadcast_to(np.arange(longest, dtype=np.int64), input_ids.shape).copy(),
        }
        (output,) = self._session.run([self._folder.output], {name: values[name] for name in self._folder.inputs})
        if self._folder.pooling is None:
            vectors: FloatArray = output.astype(np.float32, copy=False)
        else:
            vectors = pool(output, mask, self._folder.pooling)
        return normalized(vectors) if self._folder.is_normalized else vectors

    def _is_steady(self, trial: Sequence[IntArray], alone: FloatArray) -> bool:
        limit = DRIFT_MAX.get(self._folder.precision.kind)
        if limit is None:
            # Quantised: what a batch changes depends on what is in it, so no trial proves anything.
            return False
        drift = np.abs(self.embed(trial) - alone).max()
        return bool(drift <= limit * max(1.0, float(np.linalg.norm(alone, axis=1).max())))


def load_embedding_session(
    folder: EmbeddingFolder,
    *,
    threads: int = 0,
    spinning: bool = True,
    provider: Provider = "auto",
    memory_limit_bytes: int | None = None,
    device_index: int = 0,
) -> EmbeddingSession:
    """Load the graph and try it, on CUDA where `provider` lets and a device answers, else on the CPU. The options are
    those of nodes.engine.session.load_session. Raises ModelFolderInvalid."""
    weight_bytes = sum(file.stat().st_size for file in folder.weight_files())
    needed = weight_bytes * memory.WEIGHTS_NUMERATOR // memory.WEIGHTS_DENOMINATOR + memory.HEADROOM_BYTES
    if memory_limit_bytes is not None and needed > memory_limit_bytes:
        raise _too_large(folder, needed, "the memory limit", memory_limit_bytes)
    if provider != "cpu":
        try:
            return _on_cuda(folder, threads, spinning, memory_limit_bytes, device_index)
        except DeviceUnavailable as exc:
            if provider == "cuda":
                raise cannot_run(folder.path, str(exc)) from exc
            logger.info("running on the CPU", extra={"reason": str(exc)})
    available = memory.available_host_bytes()
    if available is not None and needed > available:
        raise _too_large(folder, needed, "available memory", available)
    try:
        session = call_making_way(lambda: _open(folder, threads, spinning, [CPU], [{}]))
        return _started(EmbeddingSession(session, folder, "cpu"), folder)
    except ModelFolderInvalid:
        raise
    except MemoryError as exc:
        raise ModelFolderInvalid(folder.path, f"memory ran out while loading {folder.graph_name}", MEMORY_FIX) from exc
    except Exception as exc:  # ONNX Runtime has no common root for what it raises
        reason = f"{folder.graph_name} cannot be loaded ({_first_line(exc)})"
        raise ModelFolderInvalid(folder.path, reason, EXPORT_FIX) from exc


def _on_cuda(
    folder: EmbeddingFolder, threads: int, spinning: bool, memory_limit_bytes: int | None, device_index: int
) -> EmbeddingSession:
    """Raises DeviceUnavailable."""
    prepare_cuda(device_index)
    try:
        settings = [provider_options(device_index, memory_limit_bytes), {}]
        session = _open(folder, threads, spinning, [CUDA, CPU], settings)
        if CUDA not in session.get_providers():
            raise DeviceUnavailable(f"ONNX Runtime could not load its CUDA provider; {INSTALL_FIX}")
        return _started(EmbeddingSession(session, folder, "cuda"), folder)
    except (DeviceUnavailable, ModelFolderInvalid):
        raise
    except Exception as exc:  # ONNX Runtime has no common root for what it raises
        raise DeviceUnavailable(_first_line(exc)) from exc


def _open(
    folder: EmbeddingFolder,
    threads: int,
    spinning: bool,
    providers: list[str],
    provider_settings: list[dict[str, str]],
) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    options.log_severity_level = LOG_FATAL_ONLY
    return onnxruntime.InferenceSession(
        str(folder.graph_file), options, providers=providers, provider_options=provider_settings, enable_fallback=0
    )


def _started(session: EmbeddingSession, folder: EmbeddingFolder) -> EmbeddingSession:
    facts = {
        "model": folder.path.name,
        "device": session.device,
        "graph": folder.graph_name,
        "precision": str(folder.precision),
        "dimensions": session.dimensions,
        "context_length": folder.context_length,
        "pooling": folder.pooling or folder.output,
        "rows_max": session.rows_max,
    }
    logger.info("embedding model loaded", extra=facts)
    return session


def _too_large(folder: EmbeddingFolder, needed: int, source: str, there: int) -> ModelFolderInvalid:
    reason = f"it does not fit into memory: it needs {needed // memory.MIB} MiB, and {source} is {there // memory.MIB}"
    return ModelFolderInvalid(folder.path, reason, MEMORY_FIX)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:COMPLAINT_CHARS_MAX]
