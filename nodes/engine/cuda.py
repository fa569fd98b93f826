"""The CUDA provider: what must be there for it, and the few calls of CUDA's runtime library beside ONNX Runtime.

Not measured on a GPU.
"""

from __future__ import annotations

import ctypes
import io
import logging
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import onnxruntime

from nodes.engine import devices
from nodes.engine.model_folder import ModelFolderInvalid

logger = logging.getLogger(__name__)

CUDA = "CUDAExecutionProvider"
LOG_FATAL_ONLY = 4  # what ONNX Runtime would write to stderr as an error is raised as well
INSTALL_FIX = "install the extra cuda (pip install -e '.[cuda]' in the checkout)"
DEVICE_TO_DEVICE = 3  # cudaMemcpyKind
COMPLAINT_CHARS_MAX = 200


class DeviceUnavailable(Exception):
    """CUDA was asked for, and its provider, libraries or device are not there or refuse the model."""


def prepare_cuda(device_index: int) -> CudaRuntime:
    """Load CUDA's libraries, from the packages of the `cuda` extra where they are installed, and look for the device.

    Raises DeviceUnavailable, which says what is missing."""
    if CUDA not in onnxruntime.get_available_providers():
        raise DeviceUnavailable("this onnxruntime was built without CUDA; install onnxruntime-gpu in its place")
    if sys.platform != "win32" and not devices.is_nvidia_there():
        raise DeviceUnavailable(f"no NVIDIA device is there, neither {' nor '.join(devices.NVIDIA_DEVICES)}")
    onnxruntime.set_default_logger_severity(LOG_FATAL_ONLY)  # the provider's libraries are loaded outside a session
    with redirect_stdout(io.StringIO()) as printed:  # what it cannot load it prints, once a library
        onnxruntime.preload_dlls()
    if complaints := printed.getvalue().strip():
        # Not the end yet: the libraries may be where the system's loader finds them.
        logger.info("CUDA libraries are missing", extra={"reason": complaints.splitlines()[0][:COMPLAINT_CHARS_MAX]})
    runtime = CudaRuntime(device_index)
    count = runtime.device_count()
    if device_index >= count:
        raise DeviceUnavailable(f"there is no device {device_index}: CUDA sees {count}, counted from 0")
    return runtime


def cannot_run(path: Path, reason: str) -> ModelFolderInvalid:
    """Of a folder that is to run on CUDA and nowhere else."""
    fix = f'give the provider "auto" or "cpu", or {INSTALL_FIX} on a machine with a GPU'
    return ModelFolderInvalid(path, f"CUDA cannot run it ({reason})", fix)


def provider_options(device_index: int, memory_limit_bytes: int | None) -> dict[str, str]:
    """Of CUDAExecutionProvider. Without TF32, whose 10 bits of mantissa would make float32 graphs differ from those on
    other nodes; memory grows by what is needed instead of by doubling, since KV is allocated once and up front."""
    options = {"device_id": str(device_index), "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
    if memory_limit_bytes is not None:
        options["gpu_mem_limit"] = str(memory_limit_bytes)
    return options


class CudaRuntime:
    """The runtime library that ONNX Runtime uses, for one device. Called from any thread."""

    def __init__(self, device_index: int) -> None:
        """Raises DeviceUnavailable."""
        self.device_index = device_index
        major = str(onnxruntime.cuda_version).partition(".")[0]
        name = f"cudart64_{major}.dll" if sys.platform == "win32" else f"libcudart.so.{major}"
        try:
            self._library: Any = ctypes.CDLL(name)
        except OSError as exc:
            raise DeviceUnavailable(f"{name} cannot be loaded; {INSTALL_FIX}") from exc

    def device_count(self) -> int:
        """Raises DeviceUnavailable where the driver does not answer."""
        count = ctypes.c_int(0)
        if failure := self._library.cudaGetDeviceCount(ctypes.byref(count)):
            raise DeviceUnavailable(f"the NVIDIA driver does not answer (cudaGetDeviceCount: error {failure})")
        return count.value

    def free_bytes(self) -> int:
        """Memory that is free on the device. Raises DeviceUnavailable."""
        free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
        failure = self._library.cudaSetDevice(self.device_index)
        failure = failure or self._library.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
        if failure:
            raise DeviceUnavailable(f"device {self.device_index} does not answer (cudaMemGetInfo: error {failure})")
        return free.value

    def select(self) -> None:
        """Let this thread's next calls be about the device. The current device is each thread's own."""
        self._check("cudaSetDevice", self._library.cudaSetDevice(self.device_index))

    def copy_rows(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """Copy `rows` pieces of `width` bytes, a pitch apart, within the device. Returns before they are copied."""
        failure = self._library.cudaMemcpy2D(
            ctypes.c_void_p(target),
            ctypes.c_size_t(target_pitch),
            ctypes.c_void_p(source),
            ctypes.c_size_t(source_pitch),
            ctypes.c_size_t(width),
            ctypes.c_size_t(rows),
            DEVICE_TO_DEVICE,
        )
        self._check("cudaMemcpy2D", failure)

    def synchronize(self) -> None:
        """Wait for all that the device does. ONNX Runtime's stream does not wait for copies made here by itself."""
        self._check("cudaDeviceSynchronize", self._library.cudaDeviceSynchronize())

    def _check(self, call: str, failure: int) -> None:
        if failure:
            raise RuntimeError(f"{call} failed with error {failure}")
