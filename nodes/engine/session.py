"""A model's graph and its KV memory, over ONNX Runtime: the only module that imports it.

KV memory is one buffer per layer and side, [slots, kv_heads, capacity, head_size], bound as past and as present, so that a
step writes in place. Rows beyond a sequence's length are garbage, which the attention mask hides. Bindings for decoding
are made once per batch size, and the mask is always as wide as the capacity: nothing is bound again between two steps.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from nodes.engine.kv_slots import Move
from nodes.engine.model_loader import CAPACITY_DEFAULT_MAX, ModelFolder, ModelFolderInvalid

logger = logging.getLogger(__name__)

Provider = Literal["auto", "cpu", "cuda"]
TokenIds = NDArray[np.int64]
Logits = NDArray[np.float32]

_SEVERITY_ERROR = 3
_DTYPES: dict[str, Any] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Session(Protocol):
    """What an engine needs of a model. Used by one thread. tests/unit/fake_session.py is the second implementation."""

    slots: int
    capacity: int  # tokens a slot holds
    kv_bytes: int
    provider: str

    def decode(self, token_ids: TokenIds, lengths: TokenIds) -> Logits:
        """One token for each of the first len(token_ids) slots; row i has lengths[i] tokens in its slot, and one more
        afterwards. Returns float32 [rows, vocabulary], valid until the next call."""
        ...

    def prefill(self, slot: int, token_ids: TokenIds, length: int) -> Logits:
        """Append tokens to a slot that holds `length` already. Returns float32 [vocabulary] of the last one."""
        ...

    def move(self, move: Move) -> None: ...


class OrtSession:
    """A Session of ONNX Runtime. CUDA: KV memory lives on the device and is bound by pointer; not measured on a GPU."""

    def __init__(
        self, folder: ModelFolder, *, slots: int, capacity: int | None, threads: int, spinning: bool, provider: Provider
    ) -> None:
        """Raises ModelFolderInvalid when the graph cannot be loaded or is not of the supported kind."""
        self._folder = folder
        self.slots = slots
        self.capacity = min(capacity or CAPACITY_DEFAULT_MAX, folder.context_length)
        self._session, self.provider = _open(folder, threads, spinning, provider)
        self._device = "cuda" if self.provider == "cuda" else "cpu"
        self._kv_type, self._logits_type, self._rows_all = self._check_graph()
        shape = (slots, folder.kv_heads, self.capacity, folder.head_size)
        # Zeroed: garbage may be NaN, and NaN times a masked 0 is NaN.
        self._kv = [
            ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, self._kv_type), self._device, 0)
            for _ in range(2 * folder.layers)
        ]
        self._row_bytes = int(np.prod(shape[1:])) * self._kv_type().itemsize
        self.kv_bytes = self._row_bytes * slots * len(self._kv)
        self._columns = np.arange(self.capacity)
        self._ids = np.zeros((slots, 1), np.int64)
        self._mask = np.zeros(slots * self.capacity, np.int64)
        self._logits = np.empty((slots, 1, folder.vocabulary_size), self._logits_type)
        self._run_options = ort.RunOptions()
        self._decode_bindings: dict[int, Any] = {}
        self._prefill_bindings: dict[int, Any] = {}
        self.seconds_in_runtime = 0.0  # of all runs so far; what a step takes beyond it is ours

    def decode(self, token_ids: TokenIds, lengths: TokenIds) -> Logits:
        rows = len(token_ids)
        binding = self._decode_bindings.get(rows) or self._bind_decode(rows)
        self._ids[:rows, 0] = token_ids
        mask = self._mask[: rows * self.capacity].reshape(rows, self.capacity)
        np.less_equal(self._columns, lengths[:, None], out=mask, casting="unsafe")
        self._run(binding)
        return self._logits[:rows, 0].astype(np.float32, copy=False)

    def prefill(self, slot: int, token_ids: TokenIds, length: int) -> Logits:
        count = len(token_ids)
        binding = self._prefill_bindings.get(slot)
        if binding is None:
            binding = self._prefill_bindings[slot] = self._session.io_binding()
            self._bind_kv(binding, slot, 1)
        ids = np.ascontiguousarray(token_ids, np.int64).reshape(1, count)
        mask = np.ones((1, length + count), np.int64)
        logits = np.empty((1, count if self._rows_all else 1, self._folder.vocabulary_size), self._logits_type)
        for name, array in (("input_ids", ids), ("attention_mask", mask)):
            binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)
        binding.bind_output("logits", "cpu", 0, self._logits_type, logits.shape, logits.ctypes.data)
        self._run(binding)
        last: Logits = logits[0, -1].astype(np.float32, copy=False)
        return last

    def move(self, move: Move) -> None:
        if self._device == "cpu":
            for value in self._kv:
                rows = value.numpy()
                rows[move.target, :, : move.length] = rows[move.source, :, : move.length]
            return
        # ONNX Runtime copies whole tensors only; a prefill of one token elsewhere is rarer than a compaction, and a
        # round trip through host memory is correct on every device.
        for value in self._kv:
            host = value.numpy()
            host[move.target, :, : move.length] = host[move.source, :, : move.length]
            value.update_inplace(host)

    def _run(self, binding: Any) -> None:
        started = time.perf_counter()
        self._session.run_with_iobinding(binding, self._run_options)
        self.seconds_in_runtime += time.perf_counter() - started

    def _bind_decode(self, rows: int) -> Any:
        binding = self._decode_bindings[rows] = self._session.io_binding()
        self._bind_kv(binding, 0, rows)
        binding.bind_input("input_ids", "cpu", 0, np.int64, (rows, 1), self._ids.ctypes.data)
        binding.bind_input("attention_mask", "cpu", 0, np.int64, (rows, self.capacity), self._mask.ctypes.data)
        shape = (rows, 1, self._folder.vocabulary_size)
        binding.bind_output("logits", "cpu", 0, self._logits_type, shape, self._logits.ctypes.data)
        return binding

    def _bind_kv(self, binding: Any, first: int, rows: int) -> None:
        """The KV memory of slots [first, first + rows), as past and as present: the same pointer, so in place."""
        folder = self._folder
        shape = (rows, folder.kv_heads, self.capacity, folder.head_size)
        names = ((folder.past_key, folder.present_key), (folder.past_value, folder.present_value))
        for layer in range(folder.layers):
            for side, (past, present) in enumerate(names):
                pointer = self._kv[2 * layer + side].data_ptr() + first * self._row_bytes
                binding.bind_input(past % layer, self._device, 0, self._kv_type, shape, pointer)
                binding.bind_output(present % layer, self._device, 0, self._kv_type, shape, pointer)

    def _check_graph(self) -> tuple[Any, Any, bool]:
        """(dtype of KV, dtype of logits, whether logits come for all positions). Raises ModelFolderInvalid."""
        folder = self._folder
        inputs = {i.name: i for i in self._session.get_inputs()}
        outputs = {o.name: o for o in self._session.get_outputs()}
        expected = {"input_ids", "attention_mask"}
        for layer in range(folder.layers):
            expected |= {folder.past_key % layer, folder.past_value % layer}
        if set(inputs) != expected or "logits" not in outputs:
            odd = sorted(set(inputs) ^ expected) or ["logits"]
            raise ModelFolderInvalid(
                folder.path, f"{folder.graph.name} does not have the inputs of a genai decoder: {', '.join(odd[:4])}"
            )
        past = inputs[folder.past_key % 0]
        if list(past.shape[1::2]) != [folder.kv_heads, folder.head_size]:
            raise ModelFolderInvalid(
                folder.path, f"{folder.graph.name} has KV of shape {past.shape}, genai_config.json says "
                f"{folder.kv_heads} heads of size {folder.head_size}",
            )  # fmt: skip
        logits = outputs["logits"]
        if logits.shape[-1] != folder.vocabulary_size:
            raise ModelFolderInvalid(
                folder.path, f"{folder.graph.name} has {logits.shape[-1]} logits, genai_config.json says "
                f"{folder.vocabulary_size}",
            )  # fmt: skip
        if past.type not in _DTYPES or logits.type not in _DTYPES:
            raise ModelFolderInvalid(
                folder.path, f"{folder.graph.name} keeps KV as {past.type}: float and float16 work"
            )
        return _DTYPES[past.type], _DTYPES[logits.type], logits.shape[1] != 1


def _open(folder: ModelFolder, threads: int, spinning: bool, provider: Provider) -> tuple[Any, str]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _SEVERITY_ERROR
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    if provider != "cpu" and _has_cuda():
        try:
            with _quiet_stderr(enabled=provider == "auto"):
                ort.preload_dlls()
                session = _create(folder, options, ["CUDAExecutionProvider", "CPUExecutionProvider"])
            if "CUDAExecutionProvider" in session.get_providers():
                return session, "cuda"
        except ModelFolderInvalid:
            if provider == "cuda":
                raise
            logger.warning("CUDA refuses the model; serving it on the CPU", extra={"model": folder.path.name})
    if provider == "cuda":
        raise ModelFolderInvalid(
            folder.path,
            "provider cuda: no CUDA device answers; install the extra ai-cluster[cuda], or use --provider auto",
        )
    return _create(folder, options, ["CPUExecutionProvider"]), "cpu"


def _create(folder: ModelFolder, options: ort.SessionOptions, providers: list[str]) -> Any:
    try:
        return ort.InferenceSession(str(folder.graph), options, providers=providers)
    except Exception as exc:  # ONNX Runtime's exceptions share no base but this
        reason = " ".join(str(exc).split())[:300]
        raise ModelFolderInvalid(folder.path, f"ONNX Runtime cannot load {folder.graph.name}: {reason}") from exc


def _has_cuda() -> bool:
    """Ask the device, not the wheel: onnxruntime-gpu lists CUDA on every machine and complains where there is none."""
    return "CUDAExecutionProvider" in ort.get_available_providers() and (
        os.name == "nt" or Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()
    )


@contextlib.contextmanager
def _quiet_stderr(*, enabled: bool) -> Iterator[None]:
    """Libraries that are missing are told on the C level; with `auto` our own line says what matters."""
    if not enabled:
        yield
        return
    saved = os.dup(2)
    silent = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(silent, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(silent)
