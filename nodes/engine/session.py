"""Runs a decoder graph on ONNX Runtime over KV buffers that it owns. Nothing else here imports onnxruntime.

Per layer and side there is one buffer [slots, kv_heads, capacity, head_size], bound as past and as present, so that the
graph writes new rows in place. Decoding slots [0, k) binds the buffers' beginning with batch k; prefilling one slot
binds the address where it begins. Bindings are made once: for decoding all of k's inputs and outputs keep their
addresses, and the mask is always as wide as the capacity. That halves the time spent outside ONNX Runtime.

On CUDA the KV buffers are on the device; ids, mask and logits stay on the host, where ONNX Runtime copies them from and
to. Not measured on a GPU.
"""

from __future__ import annotations

import ctypes
import io
import logging
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime

from nodes.engine.model_loader import BUILD_FIX, ModelFolder, ModelFolderInvalid

logger = logging.getLogger(__name__)

Provider = Literal["auto", "cpu", "cuda"]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
LOG_FATAL_ONLY = 4  # what ONNX Runtime would write to stderr as an error is raised as well
KV_TYPES: dict[str, type[np.float32] | type[np.float16]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
# Slots hold at most this many tokens unless told otherwise: KV of a 128k context would not fit beside the weights.
CAPACITY_DEFAULT_MAX = 8192
PREFILL_TOKENS_MAX = 64  # of one prefill(): the scheduler's chunk
COMPLAINT_CHARS_MAX = 200
# One of them exists where NVIDIA's driver is loaded, on Linux and on WSL.
NVIDIA_DEVICES = ("/dev/nvidia0", "/dev/dxg")
CUDA_MEMCPY_DEVICE_TO_DEVICE = 3


class DeviceUnavailable(Exception):
    """CUDA was asked for, and its provider, libraries or device are not there or refuse the model."""


def load_session(
    folder: ModelFolder,
    *,
    slots: int,
    capacity: int | None = None,
    threads: int = 0,
    spinning: bool = True,
    provider: Provider = "auto",
) -> OnnxSession:
    """Load the graph and run it once, on CUDA where `provider` lets and a device answers, else on the CPU.

    capacity: tokens a slot holds; None: the context length, at most CAPACITY_DEFAULT_MAX; never more than the context.
    threads: 0 uses all cores. spinning: threads wait busily between steps; off where other processes need the cores.
    Raises ModelFolderInvalid, also when the provider is "cuda" and CUDA cannot run it.
    """
    capacity = _capacity(folder, capacity)
    if provider != "cpu":
        try:
            _prepare_cuda()
            return OnnxSession(_open(folder, threads, spinning, CUDA), folder, slots, capacity, CudaKv)
        except DeviceUnavailable as exc:
            if provider == "cuda":
                logger.error("CUDA cannot be used", extra={"reason": str(exc)})
                fix = 'give the provider "auto" or "cpu", or install ai-cluster[cuda] on a machine with a GPU'
                raise ModelFolderInvalid(folder.path, f"CUDA cannot run it ({exc})", fix) from exc
            logger.info("running on the CPU", extra={"reason": str(exc)})
    return OnnxSession(_open(folder, threads, spinning, CPU), folder, slots, capacity, HostKv)


def _capacity(folder: ModelFolder, wanted: int | None) -> int:
    window = folder.sliding_window or 0
    if wanted is None:
        wanted = max(CAPACITY_DEFAULT_MAX, window)
    capacity = min(wanted, folder.context_length)
    if capacity < min(window, folder.context_length):
        reason = f"its attention looks back {window} tokens, and the capacity is {capacity}"
        raise ModelFolderInvalid(folder.path, reason, f"give it a capacity of at least {window}")
    return capacity


def _prepare_cuda() -> None:
    """Raises DeviceUnavailable."""
    if CUDA not in onnxruntime.get_available_providers():
        raise DeviceUnavailable("this onnxruntime was built without CUDA")
    if sys.platform != "win32" and not any(Path(device).exists() for device in NVIDIA_DEVICES):
        raise DeviceUnavailable("no NVIDIA device is there")
    onnxruntime.set_default_logger_severity(LOG_FATAL_ONLY)  # the provider's libraries are loaded outside a session
    with redirect_stdout(io.StringIO()) as printed:  # what it cannot load it prints, once a library
        onnxruntime.preload_dlls()
    if complaints := printed.getvalue():
        logger.info("CUDA libraries are missing", extra={"reason": complaints.splitlines()[0]})


def _open(folder: ModelFolder, threads: int, spinning: bool, provider: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    options.log_severity_level = LOG_FATAL_ONLY
    providers = [CPU] if provider == CPU else [provider, CPU]
    try:
        session = onnxruntime.InferenceSession(str(folder.graph_file), options, providers=providers, enable_fallback=0)
    except Exception as exc:  # ONNX Runtime has no common root for what it raises
        if provider == CUDA:
            raise DeviceUnavailable(_first_line(exc)) from exc
        reason = f"{folder.graph_file.name} cannot be loaded ({_first_line(exc)})"
        if "external data" in str(exc).lower() and folder.weight_files() == [folder.graph_file]:
            reason = f"{folder.graph_file.name}.data is missing, in which {folder.graph_file.name} has its weights"
        raise ModelFolderInvalid(folder.path, reason, BUILD_FIX) from exc
    if provider not in session.get_providers():
        raise DeviceUnavailable("ONNX Runtime could not load its CUDA provider; install ai-cluster[cuda]")
    return session


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:COMPLAINT_CHARS_MAX]


class KvBuffers(Protocol):
    """Where the KV rows are. Each buffer is [slots, kv_heads, capacity, head_size]; there is one per layer and side."""

    device: str
    nbytes: int

    def __init__(self, count: int, shape: tuple[int, int, int, int], dtype: Any) -> None: ...

    def address(self, index: int, slot: int) -> int:
        """Where `slot` begins in buffer `index`."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy rows [0, length) of one slot to another, in all buffers."""
        ...


class HostKv:
    """KV rows in this machine's memory; pages that no row was written to take none."""

    device = "cpu"

    def __init__(self, count: int, shape: tuple[int, int, int, int], dtype: Any) -> None:
        self._buffers = [np.zeros(shape, dtype) for _ in range(count)]
        self.nbytes = sum(buffer.nbytes for buffer in self._buffers)

    def address(self, index: int, slot: int) -> int:
        return int(self._buffers[index][slot].ctypes.data)

    def copy(self, source: int, target: int, length: int) -> None:
        for buffer in self._buffers:
            buffer[target, :, :length] = buffer[source, :, :length]


class CudaKv:
    """KV rows on the first CUDA device, zeroed once so that no row was ever NaN. Not measured on a GPU."""

    device = "cuda"

    def __init__(self, count: int, shape: tuple[int, int, int, int], dtype: Any) -> None:
        zeros = np.zeros(shape, dtype)
        self._values = []
        for _ in range(count):
            value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, self.device, 0)
            value.update_inplace(zeros)
            self._values.append(value)
        _, self._heads, capacity, head_size = shape
        self._row_bytes = head_size * zeros.itemsize
        self._head_bytes = capacity * self._row_bytes
        self._slot_bytes = self._heads * self._head_bytes
        self.nbytes = count * zeros.nbytes
        self._runtime = _cuda_runtime()

    def address(self, index: int, slot: int) -> int:
        return int(self._values[index].data_ptr()) + slot * self._slot_bytes

    def copy(self, source: int, target: int, length: int) -> None:
        for index in range(len(self._values)):
            failure = self._runtime.cudaMemcpy2D(
                ctypes.c_void_p(self.address(index, target)),
                ctypes.c_size_t(self._head_bytes),
                ctypes.c_void_p(self.address(index, source)),
                ctypes.c_size_t(self._head_bytes),
                ctypes.c_size_t(length * self._row_bytes),
                ctypes.c_size_t(self._heads),
                CUDA_MEMCPY_DEVICE_TO_DEVICE,
            )
            if failure:
                raise RuntimeError(f"cudaMemcpy2D failed with error {failure}")
        # Copies within the device return before they are done, and ONNX Runtime's stream does not wait for them.
        if failure := self._runtime.cudaDeviceSynchronize():
            raise RuntimeError(f"cudaDeviceSynchronize failed with error {failure}")


def _cuda_runtime() -> Any:
    """The CUDA runtime library that ONNX Runtime uses, which is loaded already. Raises DeviceUnavailable."""
    major = str(onnxruntime.cuda_version).partition(".")[0]
    name = f"cudart64_{major}.dll" if sys.platform == "win32" else f"libcudart.so.{major}"
    try:
        return ctypes.CDLL(name)
    except OSError as exc:
        raise DeviceUnavailable(f"{name} cannot be loaded; install ai-cluster[cuda]") from exc


class OnnxSession:
    """A decoder graph and the KV rows of `slots` sequences. Used by one thread at a time.

    The caller knows how many rows of each slot are valid. Arrays returned are views of a buffer that the next call
    overwrites.
    """

    def __init__(self, session: Any, folder: ModelFolder, slots: int, capacity: int, kv: type[KvBuffers]) -> None:
        """Raises ModelFolderInvalid when the graph is not the one that the folder's configuration describes, and
        DeviceUnavailable when the device cannot run it."""
        graph = _Graph(session, folder)
        self.slots = slots
        self.capacity = capacity
        self.vocabulary_size = graph.vocabulary_size
        self._session = session
        self._names = folder.tensors
        self._layers = folder.layers
        self._kv_shape = (folder.kv_heads, capacity, folder.head_size)
        self._kv_type = graph.kv_type
        self._logits_type = graph.logits_type
        self._is_pruned = graph.is_pruned
        self._kv = kv(2 * folder.layers, (slots, *self._kv_shape), graph.kv_type)
        self.device = self._kv.device
        self._run_options = onnxruntime.RunOptions()

        self._ids: IntArray = np.zeros((slots, 1), np.int64)
        self._mask: IntArray = np.zeros((slots, capacity), np.int64)
        self._mask_lengths: IntArray = np.zeros(slots, np.int64)  # ones at the beginning of each row of the mask
        self._rows = np.arange(slots)
        self._columns = np.arange(capacity)
        self._logits = np.empty((slots, 1, graph.vocabulary_size), graph.logits_type)
        self._decode_bindings: dict[int, Any] = {}  # by k: at most `slots`

        self._chunk_ids: IntArray = np.zeros((1, PREFILL_TOKENS_MAX), np.int64)
        self._ones: IntArray = np.ones((1, capacity), np.int64)
        chunk_rows = 1 if self._is_pruned else PREFILL_TOKENS_MAX
        self._chunk_logits = np.empty((1, chunk_rows, graph.vocabulary_size), graph.logits_type)
        self._prefill_bindings: dict[int, Any] = {}  # by slot: at most `slots`
        self._warm_up(folder)

    @property
    def kv_bytes(self) -> int:
        return self._kv.nbytes

    def decode(self, token_ids: IntArray, lengths: IntArray) -> FloatArray:
        """Feed one token to each of the slots [0, k), at row lengths[slot] < capacity. Returns logits [k, vocabulary].

        token_ids, lengths: int64 [k], not kept."""
        count = len(token_ids)
        self._ids[:count, 0] = token_ids
        self._set_mask(lengths)
        binding = self._decode_bindings.get(count)
        if binding is None:
            binding = self._decode_bindings[count] = self._decode_binding(count)
        self._session.run_with_iobinding(binding, self._run_options)
        return self._as_float(self._logits[:count, 0])

    def prefill(self, slot: int, token_ids: IntArray, start: int) -> FloatArray:
        """Write the rows [start, start + S) of a slot whose rows below start are valid; 1 <= S <= PREFILL_TOKENS_MAX.
        Returns the logits [vocabulary] after the last of them."""
        count = len(token_ids)
        width = start + count
        assert 1 <= count <= PREFILL_TOKENS_MAX, f"{count} tokens in a chunk of at most {PREFILL_TOKENS_MAX}"
        assert width <= self.capacity, f"{width} rows in a slot of {self.capacity}"
        self._chunk_ids[0, :count] = token_ids
        rows = 1 if self._is_pruned else count
        binding = self._prefill_bindings.get(slot)
        if binding is None:
            binding = self._prefill_bindings[slot] = self._session.io_binding()
            self._bind_kv(binding, slot, 1)
        names = self._names
        self._bind_input(binding, names.input_ids, (1, count), self._chunk_ids)
        self._bind_input(binding, names.attention_mask, (1, width), self._ones)
        self._bind_logits(binding, (1, rows, self.vocabulary_size), self._chunk_logits)
        self._session.run_with_iobinding(binding, self._run_options)
        # Without a pruned head the graph writes [1, count, vocabulary] to the buffer's beginning.
        return self._as_float(self._chunk_logits[0, rows - 1])

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy rows [0, length) of one slot to another."""
        self._kv.copy(source, target, length)

    def swap(self, first: int, second: int, first_length: int, second_length: int) -> None:
        for buffer in self._kv._buffers:  # type: ignore[attr-defined]
            held = buffer[first, :, :first_length].copy()
            buffer[first, :, :second_length] = buffer[second, :, :second_length]
            buffer[second, :, :first_length] = held

    def recover(self) -> None:
        self._decode_bindings.clear()

    is_exact = True

    def _set_mask(self, lengths: IntArray) -> None:
        """Let row i of the mask be lengths[i] + 1 ones. As a rule each row has grown by one since the last step."""
        count = len(lengths)
        known = self._mask_lengths[:count]
        changed = np.flatnonzero(known != lengths)
        if changed.size:
            self._mask[changed] = self._columns < lengths[changed, None]
        self._mask[self._rows[:count], lengths] = 1
        known[:] = lengths
        known += 1

    def _decode_binding(self, count: int) -> Any:
        binding = self._session.io_binding()
        self._bind_kv(binding, 0, count)
        self._bind_input(binding, self._names.input_ids, (count, 1), self._ids)
        self._bind_input(binding, self._names.attention_mask, (count, self.capacity), self._mask)
        self._bind_logits(binding, (count, 1, self.vocabulary_size), self._logits)
        return binding

    def _bind_kv(self, binding: Any, slot: int, count: int) -> None:
        shape = (count, *self._kv_shape)
        for index, (past, present) in enumerate(_kv_names(self._names, self._layers)):
            address = self._kv.address(index, slot)
            binding.bind_input(past, self.device, 0, self._kv_type, shape, address)
            binding.bind_output(present, self.device, 0, self._kv_type, shape, address)

    def _bind_input(self, binding: Any, name: str, shape: tuple[int, ...], buffer: IntArray) -> None:
        binding.bind_input(name, "cpu", 0, np.int64, shape, buffer.ctypes.data)

    def _bind_logits(self, binding: Any, shape: tuple[int, ...], buffer: npt.NDArray[Any]) -> None:
        binding.bind_output(self._names.logits, "cpu", 0, self._logits_type, shape, buffer.ctypes.data)

    def _as_float(self, logits: npt.NDArray[Any]) -> FloatArray:
        return logits.astype(np.float32, copy=False)

    def _warm_up(self, folder: ModelFolder) -> None:
        """One chunk and one decode step, so that the first request pays for no allocation and a graph that cannot run
        is found now."""
        try:
            self.prefill(0, np.zeros(min(2, self.capacity), np.int64), 0)
            self.decode(np.zeros(1, np.int64), np.ones(1, np.int64))
        except Exception as exc:  # ONNX Runtime has no common root for what it raises
            if self.device == CudaKv.device:
                raise DeviceUnavailable(_first_line(exc)) from exc
            reason = f"{folder.graph_file.name} does not run ({_first_line(exc)})"
            raise ModelFolderInvalid(folder.path, reason, BUILD_FIX) from exc


class _Graph:
    """What the graph's inputs and outputs say, checked against the folder's configuration."""

    def __init__(self, session: Any, folder: ModelFolder) -> None:
        self._folder = folder
        names = folder.tensors
        inputs = {node.name: node for node in session.get_inputs()}
        outputs = {node.name: node for node in session.get_outputs()}
        kv = list(_kv_names(names, folder.layers))
        wanted = {names.input_ids, names.attention_mask, *(past for past, _ in kv)}
        if missing := sorted(wanted - inputs.keys()):
            raise self._invalid(f"has no input {missing[0]}")
        if extra := sorted(inputs.keys() - wanted):
            raise self._invalid(f"has an input {extra[0]} that {folder.layers} layers do not explain")
        if missing := sorted({names.logits, *(present for _, present in kv)} - outputs.keys()):
            raise self._invalid(f"has no output {missing[0]}")
        past = inputs[kv[0][0]]
        self._expect("kv_heads", past.shape[1], folder.kv_heads)
        self._expect("head_size", past.shape[3], folder.head_size)
        logits = outputs[names.logits]
        self._expect("vocabulary", logits.shape[-1], folder.vocabulary_size)
        self.kv_type = self._type(past)
        self.logits_type = self._type(logits)
        self.vocabulary_size = folder.vocabulary_size
        self.is_pruned = logits.shape[1] == 1

    def _type(self, node: Any) -> type[np.float32] | type[np.float16]:
        if node.type not in KV_TYPES:
            raise self._invalid(f"has {node.name} of type {node.type}, and only float and float16 are served")
        return KV_TYPES[node.type]

    def _expect(self, what: str, found: object, configured: int) -> None:
        """A symbolic dimension says nothing."""
        if isinstance(found, int) and found != configured:
            raise self._invalid(f"has a {what} of {found}, and genai_config.json says {configured}")

    def _invalid(self, reason: str) -> ModelFolderInvalid:
        return ModelFolderInvalid(self._folder.path, f"{self._folder.graph_file.name} {reason}", BUILD_FIX)


def _kv_names(names: Any, layers: int) -> Iterator[tuple[str, str]]:
    """(past, present) of each buffer, in the buffers' order."""
    for layer in range(layers):
        yield names.past_key % layer, names.present_key % layer
        yield names.past_value % layer, names.present_value % layer
