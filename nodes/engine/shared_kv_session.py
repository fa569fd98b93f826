"""Runs a graph that writes new rows into the buffer of the past: com.microsoft GroupQueryAttention.

Each buffer is bound as past and as present. Decoding slots [0, k) binds the buffers' beginning with batch k; prefilling
one slot binds the address where it begins. Bindings are made once: for decoding all of k's inputs and outputs keep
their addresses, and the mask is always as wide as the capacity. That halves the time spent outside ONNX Runtime.

On CUDA the KV buffers are on the device; ids, mask and logits stay on the host, where ONNX Runtime copies them from and
to. Not measured on a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from nodes.engine.block_outputs import BlockOutputs
from nodes.engine.graph import LOGITS_TO_KEEP, NEWEST_KEYS, POSITION_IDS, TOTAL_LENGTH, DecoderGraph
from nodes.engine.kv_buffers import KvBuffers
from nodes.engine.kv_slots import BLOCK_TOKENS

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

# So many blocks together give bit for bit what each of them alone gives, in less time, since a matrix of 64 rows is too
# small for full speed: in float32 on the CPU and for heads of up to LARGE_CHUNK_HEAD_SIZE, beyond which the sums of
# attention are cut otherwise. In quantised models a chunk's size changes bits, on CUDA nobody has looked, and a graph
# that gives the logits of all tokens would pay for them with memory.
LARGE_CHUNK_BLOCKS = 4
LARGE_CHUNK_HEAD_SIZE = 128


class SharedKvSession:
    """A decoder graph and the KV rows of `slots` sequences. Used by one thread at a time.

    The caller knows how many rows of each slot are valid. Arrays returned are views of a buffer that the next call
    overwrites.
    """

    def __init__(
        self,
        session: Any,
        graph: DecoderGraph,
        slots: int,
        capacity: int,
        kv: KvBuffers,
        *,
        is_extended: bool = False,
    ) -> None:
        """kv: 2 x layers buffers of `slots` slots of `capacity` tokens. is_extended: the graph has the outputs of
        nodes.engine.graph_extension."""
        self.slots = slots
        self.capacity = capacity
        self.vocabulary_size = graph.vocabulary_size
        self.is_exact = graph.is_exact
        self.steady_rows_min = graph.steady_rows_min
        self.device = kv.device
        is_large = (
            graph.is_exact and graph.is_pruned and kv.device == "cpu" and graph.head_size <= LARGE_CHUNK_HEAD_SIZE
        )
        self.prefill_tokens_max = BLOCK_TOKENS * (LARGE_CHUNK_BLOCKS if is_large else 1)
        self._session = session
        self._graph = graph
        self._kv = kv
        self._columns = np.arange(capacity)

        # Of decoding, by slot. The mask's rows begin with as many ones as _mask_lengths says.
        self._ids: IntArray = np.zeros((slots, 1), np.int64)
        self._mask: IntArray = np.zeros((slots, capacity), np.int64)
        self._mask_lengths = [0] * slots
        self._positions: IntArray = np.zeros((slots, 1), np.int64)
        self._newest: npt.NDArray[np.int32] = np.zeros(slots, np.int32)
        self._total: npt.NDArray[np.int32] = np.full(graph.total_length_shape, capacity, np.int32)
        self._logits = np.empty((slots, 1, graph.vocabulary_size), graph.logits_type)
        self._block_outputs = BlockOutputs(self._logits) if is_extended else None
        self.logit_blocks = None if self._block_outputs is None else self._block_outputs.blocks

        # Of one chunk.
        self._one: IntArray = np.ones((), np.int64)
        self._chunk_ids: IntArray = np.zeros((1, self.prefill_tokens_max), np.int64)
        self._chunk_positions: IntArray = np.zeros((1, self.prefill_tokens_max), np.int64)
        self._chunk_newest: npt.NDArray[np.int32] = np.zeros(1, np.int32)
        self._chunk_total: npt.NDArray[np.int32] = np.zeros(graph.total_length_shape, np.int32)
        self._ones: IntArray = np.ones((1, capacity), np.int64)
        chunk_rows = 1 if graph.is_pruned else self.prefill_tokens_max
        self._chunk_logits = np.empty((1, chunk_rows, graph.vocabulary_size), graph.logits_type)
        self.recover()

    @property
    def kv_bytes(self) -> int:
        return self._kv.nbytes

    def recover(self) -> None:
        """After a run raised: forget every binding, so that the next step depends on nothing half done. Rows stay."""
        self._run_options = onnxruntime.RunOptions()
        self._decode_bindings: dict[int, Any] = {}  # by k: at most `slots`
        self._prefill_bindings: dict[int, Any] = {}  # by slot: at most `slots`
        self._mask[:] = 0
        self._mask_lengths = [0] * self.slots

    def decode(self, token_ids: IntArray, lengths: IntArray) -> FloatArray:
        """Feed one token to each of the slots [0, k), at row lengths[slot] < capacity. Returns logits [k, vocabulary].

        token_ids, lengths: int64 [k], not kept."""
        count = len(token_ids)
        self._ids[:count, 0] = token_ids
        if self._graph.has_mask:
            self._set_mask(lengths)
        if self._graph.extra_inputs:
            self._positions[:count, 0] = lengths
            self._newest[:count] = lengths
        binding = self._decode_bindings.get(count)
        if binding is None:
            binding = self._decode_bindings[count] = self._decode_binding(count)
        self._session.run_with_iobinding(binding, self._run_options)
        return as_float(self._logits[:count, 0])

    def prefill(self, slot: int, token_ids: IntArray, start: int) -> FloatArray:
        """Write the rows [start, start + S) of a slot whose rows below start are valid; 1 <= S <= prefill_tokens_max.
        Returns the logits [vocabulary] after the last of them."""
        count = len(token_ids)
        width = start + count
        assert 1 <= count <= self.prefill_tokens_max, f"{count} tokens in a chunk of at most {self.prefill_tokens_max}"
        assert width <= self.capacity, f"{width} rows in a slot of {self.capacity}"
        self._chunk_ids[0, :count] = token_ids
        self._chunk_positions[0, :count] = self._columns[start:width]
        self._chunk_newest[0] = width - 1
        self._chunk_total[...] = width
        rows = 1 if self._graph.is_pruned else count
        binding = self._prefill_bindings.get(slot)
        if binding is None:
            binding = self._prefill_bindings[slot] = self._session.io_binding()
            self._bind_kv(binding, slot, 1)
        self._bind(binding, self._graph.names.input_ids, (1, count), self._chunk_ids)
        if self._graph.has_mask:
            self._bind(binding, self._graph.names.attention_mask, (1, width), self._ones)
        self._bind_extra(binding, 1, count, self._chunk_positions, self._chunk_newest, self._chunk_total)
        self._bind_logits(binding, (1, rows, self.vocabulary_size), self._chunk_logits)
        self._session.run_with_iobinding(binding, self._run_options)
        # Without a pruned head the graph writes [1, count, vocabulary] to the buffer's beginning.
        return as_float(self._chunk_logits[0, rows - 1])

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy rows [0, length) of one slot to another."""
        self._kv.copy(source, target, length)

    def swap(self, first: int, second: int, first_length: int, second_length: int) -> None:
        """Exchange rows [0, first_length) of one slot and [0, second_length) of another."""
        self._kv.swap(first, second, first_length, second_length)

    def _set_mask(self, lengths: IntArray) -> None:
        """Let row i of the mask be lengths[i] + 1 ones. As a rule each row has grown by one since the last step.

        One by one: numpy gives up the interpreter lock when it indexes by an array, and the trio thread, which has just
        been woken with the last step's tokens, would take it for a quarter of a millisecond."""
        mask, known = self._mask, self._mask_lengths
        for slot, length in enumerate(lengths.tolist()):
            if known[slot] != length:
                mask[slot, :length] = 1
                mask[slot, length + 1 :] = 0
            mask[slot, length] = 1
            known[slot] = length + 1

    def _decode_binding(self, count: int) -> Any:
        binding = self._session.io_binding()
        self._bind_kv(binding, 0, count)
        self._bind(binding, self._graph.names.input_ids, (count, 1), self._ids)
        if self._graph.has_mask:
            self._bind(binding, self._graph.names.attention_mask, (count, self.capacity), self._mask)
        self._bind_extra(binding, count, 1, self._positions, self._newest, self._total)
        self._bind_logits(binding, (count, 1, self.vocabulary_size), self._logits)
        if self._block_outputs is not None:
            self._block_outputs.bind(binding, count)
        return binding

    def _bind_kv(self, binding: Any, slot: int, count: int) -> None:
        graph, kv = self._graph, self._kv
        shape = (count, graph.kv_heads, self.capacity, graph.head_size)
        for index, (past, present) in enumerate(graph.kv_names()):
            address = kv.address(index, slot)
            binding.bind_input(past, kv.device, kv.device_index, graph.kv_type, shape, address)
            binding.bind_output(present, kv.device, kv.device_index, graph.kv_type, shape, address)

    def _bind_extra(
        self,
        binding: Any,
        batch: int,
        tokens: int,
        positions: IntArray,
        newest: npt.NDArray[np.int32],
        total: npt.NDArray[np.int32],
    ) -> None:
        """Inputs that some graphs have beside ids and mask."""
        extra = self._graph.extra_inputs
        if POSITION_IDS in extra:
            self._bind(binding, self._graph.names.position_ids, (batch, tokens), positions)
        if NEWEST_KEYS in extra:
            self._bind(binding, NEWEST_KEYS, (batch,), newest)
        if TOTAL_LENGTH in extra:
            self._bind(binding, TOTAL_LENGTH, total.shape, total)
        if LOGITS_TO_KEEP in extra:
            self._bind(binding, LOGITS_TO_KEEP, (), self._one)

    def _bind(self, binding: Any, name: str, shape: tuple[int, ...], buffer: npt.NDArray[Any]) -> None:
        binding.bind_input(name, "cpu", 0, buffer.dtype.type, shape, buffer.ctypes.data)

    def _bind_logits(self, binding: Any, shape: tuple[int, ...], buffer: npt.NDArray[Any]) -> None:
        binding.bind_output(self._graph.names.logits, "cpu", 0, self._graph.logits_type, shape, buffer.ctypes.data)


def as_float(logits: npt.NDArray[Any]) -> FloatArray:
    """The same array where it is float32, else a copy."""
    return logits if logits.dtype == np.float32 else logits.astype(np.float32)
