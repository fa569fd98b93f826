"""Where the KV rows of a graph with shared buffers are: per layer and side one [slots, kv_heads, capacity, head_size].

A row is the key or value of one token in one head. Which rows are valid the caller knows. On CUDA they are on the
device; not measured on a GPU.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime

from nodes.engine.cuda import CudaRuntime

KvShape = tuple[int, int, int, int]


class KvBuffers(Protocol):
    """Rows of all slots. nbytes: of all buffers."""

    @property
    def device(self) -> str: ...
    @property
    def device_index(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

    def address(self, index: int, slot: int) -> int:
        """Where `slot` begins in buffer `index`."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy rows [0, length) of one slot to another, in all buffers."""
        ...

    def swap(self, a: int, b: int, length_a: int, length_b: int) -> None:
        """Rows [0, length_a) of slot a become slot b's, and rows [0, length_b) of b become a's, in all buffers."""
        ...


class HostKv:
    """KV rows in this machine's memory, which they take from the beginning: what is planned next must see it gone."""

    device = "cpu"
    device_index = 0

    def __init__(self, count: int, shape: KvShape, dtype: Any) -> None:
        """Raises MemoryError."""
        self._buffers: list[npt.NDArray[Any]] = [np.empty(shape, dtype) for _ in range(count)]
        for buffer in self._buffers:
            buffer.fill(0)  # np.zeros would leave the pages to be taken when rows are written
        self._bounce: npt.NDArray[Any] = np.empty(shape[1:], dtype)
        self.nbytes = sum(buffer.nbytes for buffer in self._buffers)

    def address(self, index: int, slot: int) -> int:
        return int(self._buffers[index][slot].ctypes.data)

    def copy(self, source: int, target: int, length: int) -> None:
        for buffer in self._buffers:
            buffer[target, :, :length] = buffer[source, :, :length]

    def swap(self, a: int, b: int, length_a: int, length_b: int) -> None:
        bounce = self._bounce[:, :length_a]
        for buffer in self._buffers:
            bounce[:] = buffer[a, :, :length_a]
            buffer[a, :, :length_b] = buffer[b, :, :length_b]
            buffer[b, :, :length_a] = bounce


class CudaKv:
    """KV rows on a CUDA device, zeroed once so that no row was ever NaN. Not measured on a GPU."""

    device = "cuda"

    def __init__(self, count: int, shape: KvShape, dtype: Any, runtime: CudaRuntime) -> None:
        """Raises what ONNX Runtime raises when the device's memory does not suffice."""
        slots, self._heads, capacity, head_size = shape
        self._runtime = runtime
        self.device_index = runtime.device_index
        zeros: npt.NDArray[Any] = np.zeros(shape, dtype)
        self._values = [self._allocate(zeros) for _ in range(count)]
        self._scratch = self._allocate(zeros[:1])
        self._row_bytes = head_size * zeros.itemsize
        self._head_bytes = capacity * self._row_bytes
        self._slot_bytes = self._heads * self._head_bytes
        self.nbytes = count * slots * self._slot_bytes

    def _allocate(self, zeros: npt.NDArray[Any]) -> Any:
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            zeros.shape, zeros.dtype.type, self.device, self.device_index
        )
        value.update_inplace(zeros)
        return value

    def address(self, index: int, slot: int) -> int:
        return int(self._values[index].data_ptr()) + slot * self._slot_bytes

    def copy(self, source: int, target: int, length: int) -> None:
        self._runtime.select()
        for index in range(len(self._values)):
            self._move(self.address(index, source), self.address(index, target), length)
        self._runtime.synchronize()

    def swap(self, a: int, b: int, length_a: int, length_b: int) -> None:
        self._runtime.select()
        scratch = int(self._scratch.data_ptr())
        for index in range(len(self._values)):
            first, second = self.address(index, a), self.address(index, b)
            # In order: all three are on the device's default stream.
            self._move(first, scratch, length_a)
            self._move(second, first, length_b)
            self._move(scratch, second, length_a)
        self._runtime.synchronize()

    def _move(self, source: int, target: int, length: int) -> None:
        width = length * self._row_bytes
        self._runtime.copy_rows(target, self._head_bytes, source, self._head_bytes, width, self._heads)
