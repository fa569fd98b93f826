"""Runs a graph that returns the past and the new rows joined: what optimum exports, without shared buffers.

All slots that decode together are given the same width W of past, with holes in the mask behind each slot's last valid
row, and position_ids that count valid rows only. A new row comes back at column W of `present` and is copied to where
its slot ends. Since the graph copies and attends to all W columns, W is as small as the longest of them allows and
doubles when a row needs it; the buffers are laid out anew then. A slot that does not decode and holds more rows, one
whose prompt is being prefilled or an idle one that is kept as a cache, is put aside: its rows are in an array of their
own, which chunks of its prompt work on. A prompt's first chunk runs without any past.

Rows behind the last valid one are multiplied by a probability of 0, so they must be finite: they are zeroed, also after
a slot was rewound or left, because a sequence may have ended for its rows being NaN.

Rows stay in this machine's memory; on CUDA, ONNX Runtime copies them to the device and back in each step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from nodes.engine.block_outputs import BlockOutputs
from nodes.engine.graph import LOGITS_TO_KEEP, POSITION_IDS, DecoderGraph
from nodes.engine.kv_slots import BLOCK_TOKENS
from nodes.engine.shared_kv_session import as_float

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

PREFILL_TOKENS_MAX = BLOCK_TOKENS  # of one prefill()
WIDTH_MIN = 64
# How far logits with holes may be from those without, as a part of their spread. Positions or masks that ignore the
# holes give others altogether; quantised activations of a chunk and of a step differ by up to a fifth.
EXACT_DEVIATION_MAX = 0.001
QUANTISED_DEVIATION_MAX = 0.4
PROBE_TOKENS = 6


class HolesUnsupported(Exception):
    """The graph takes its positions or its mask from the width of the past: sequences of different lengths cannot share
    a batch."""


class ConcatKvSession:
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
        device: str = "cpu",
        *,
        is_extended: bool = False,
    ) -> None:
        """is_extended: the graph has the outputs of nodes.engine.graph_extension."""
        self.slots = slots
        self.capacity = capacity
        self.vocabulary_size = graph.vocabulary_size
        self.is_exact = graph.is_exact
        self.steady_rows_min = graph.steady_rows_min
        self.prefill_tokens_max = PREFILL_TOKENS_MAX
        self.device = device
        self._session = session
        self._graph = graph
        self._sides = 2 * graph.layers
        self._extents: IntArray = np.zeros(slots, np.int64)  # rows from it on are zero
        self._aside: dict[int, npt.NDArray[Any]] = {}  # by slot; its rows in _past are zero
        self._rows = np.arange(slots)

        self._ids: IntArray = np.zeros((slots, 1), np.int64)
        self._positions: IntArray = np.zeros((slots, 1), np.int64)
        self._logits = np.empty((slots, 1, graph.vocabulary_size), graph.logits_type)
        self._block_outputs = BlockOutputs(self._logits) if is_extended else None
        self.logit_blocks = None if self._block_outputs is None else self._block_outputs.blocks
        self._one: IntArray = np.ones((), np.int64)
        chunk_rows = 1 if graph.is_pruned else PREFILL_TOKENS_MAX
        self._chunk_logits = np.empty((1, chunk_rows, graph.vocabulary_size), graph.logits_type)
        self._past = self._zeros(0, slots)
        self._lay_out(min(WIDTH_MIN, capacity))

    @property
    def kv_bytes(self) -> int:
        """As large as the buffers can become: rows, those that are put aside, and the joined output."""
        return 2 * self.slots * self.capacity * self._graph.kv_bytes_per_row

    @property
    def width(self) -> int:
        """Columns of past that each slot of a decode step has now."""
        return int(self._past.shape[3])

    def recover(self) -> None:
        """After a run raised: forget every binding, so that the next step depends on nothing half done. Rows stay."""
        self._lay_out(self.width)

    def decode(self, token_ids: IntArray, lengths: IntArray) -> FloatArray:
        """Feed one token to each of the slots [0, k), at row lengths[slot] < capacity. Returns logits [k, vocabulary].

        token_ids, lengths: int64 [k], not kept."""
        count = len(token_ids)
        extents = self._extents[:count]
        for slot in np.flatnonzero(extents > lengths).tolist():
            self._clear(slot, int(lengths[slot]))
        self._fit(int(lengths.max()) + 1)
        for slot in [slot for slot in self._aside if slot < count]:
            self._put_back(slot)
        self._ids[:count, 0] = token_ids
        self._positions[:count, 0] = lengths
        self._set_mask(lengths)
        binding = self._decode_bindings.get(count)
        if binding is None:
            binding = self._decode_bindings[count] = self._decode_binding(count)
        self._session.run_with_iobinding(binding, self._run_options)
        # [sides, k, heads, head_size], and numpy puts the slots first where slots and rows are given as lists.
        new = self._present_view(count, self.width + 1)[:, :, :, self.width]
        self._past[:, self._rows[:count], :, lengths] = new.transpose(1, 0, 2, 3)
        np.add(lengths, 1, out=extents)
        return as_float(self._logits[:count, 0])

    def prefill(self, slot: int, token_ids: IntArray, start: int) -> FloatArray:
        """Write the rows [start, start + S) of a slot whose rows below start are valid; 1 <= S <= prefill_tokens_max.
        Returns the logits [vocabulary] after the last of them."""
        count = len(token_ids)
        end = start + count
        assert 1 <= count <= PREFILL_TOKENS_MAX, f"{count} tokens in a chunk of at most {PREFILL_TOKENS_MAX}"
        assert end <= self.capacity, f"{end} rows in a slot of {self.capacity}"
        self._clear(slot, start)
        rows = self._rows_for_chunk(slot, start, end)
        width = rows.shape[2] if start else 0
        graph, names = self._graph, self._graph.names
        ids = np.array(token_ids, np.int64).reshape(1, count)
        mask: IntArray = np.zeros((1, width + count), np.int64)
        mask[0, :start] = 1
        mask[0, width:] = 1
        positions = np.arange(start, end, dtype=np.int64).reshape(1, count)
        logits_rows = 1 if graph.is_pruned else count
        binding = self._session.io_binding()
        self._bind_kv(binding, rows, 1, width, width + count)
        self._bind(binding, names.input_ids, (1, count), ids)
        self._bind(binding, names.attention_mask, mask.shape, mask)
        self._bind_extra(binding, (1, count), positions)
        self._bind_logits(binding, (1, logits_rows, self.vocabulary_size), self._chunk_logits)
        self._session.run_with_iobinding(binding, self._run_options)
        rows[:, :, start:end] = self._present_view(1, width + count)[:, 0, :, width:]
        self._extents[slot] = end
        return as_float(self._chunk_logits[0, logits_rows - 1])

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy rows [0, length) of one slot to another."""
        self._write(target, self._rows_of(source)[:, :, :length])

    def swap(self, first: int, second: int, first_length: int, second_length: int) -> None:
        """Exchange rows [0, first_length) of one slot and [0, second_length) of another."""
        bounce = self._rows_of(first)[:, :, :first_length].copy()
        self._write(first, self._rows_of(second)[:, :, :second_length])
        self._write(second, bounce)

    def check_holes(self) -> None:
        """Compare a step over a past with holes with one chunk without. Leaves nothing behind in slot 0's valid rows,
        of which there are none. Raises HolesUnsupported."""
        count = min(PROBE_TOKENS, self.capacity, self.vocabulary_size)
        if count < 2:
            return
        ids: IntArray = np.arange(count, dtype=np.int64)
        expected = self.prefill(0, ids, 0).copy()
        self.prefill(0, ids[:-1], 0)
        found = self.decode(ids[-1:], np.array([count - 1]))[0]
        spread = float(np.linalg.norm(expected - expected.mean()))
        deviation = float(np.linalg.norm(found - expected))
        limit = EXACT_DEVIATION_MAX if self.is_exact else QUANTISED_DEVIATION_MAX
        if not deviation <= limit * spread:
            raise HolesUnsupported(f"its logits are off by {deviation:.3g} of {spread:.3g} when the past has holes")

    # Layout of the rows.

    def _zeros(self, width: int, slots: int) -> npt.NDArray[Any]:
        """[sides, slots, heads, width, head_size]: one side's slots [0, k) are contiguous."""
        graph = self._graph
        return np.zeros((self._sides, slots, graph.kv_heads, width, graph.head_size), graph.kv_type)

    def _width_for(self, rows: int) -> int:
        width = WIDTH_MIN
        while width < rows:
            width *= 2
        # With at most half the capacity, rows that are put aside have room beside the buffers within kv_bytes.
        return width if 2 * width <= self.capacity else self.capacity

    def _fit(self, rows: int) -> None:
        """Let the width of decoding be enough for `rows`, and fall when they need less than half of it."""
        needed = self._width_for(rows)
        if needed > self.width or 2 * needed < self.width:
            self._lay_out(needed)

    def _rows_of(self, slot: int) -> npt.NDArray[Any]:
        """[sides, heads, width, head_size], a view: where the slot's rows are."""
        return self._aside.get(slot, self._past[:, slot])

    def _rows_for_chunk(self, slot: int, start: int, end: int) -> npt.NDArray[Any]:
        """Where a chunk of `slot`, whose rows end at `start`, finds its past and has room for what it adds."""
        if start == 0:
            self._aside.pop(slot, None)
        needed = self._width_for(end)
        is_wasteful = start > 0 and 2 * needed < self.width
        belongs_aside = end > self.width or is_wasteful
        for other in [other for other in self._aside if self._extents[other] <= self.width]:
            if other != slot or not belongs_aside:
                self._put_back(other)  # one prompt is prefilled at a time
        rows = self._rows_of(slot)
        if belongs_aside and (slot not in self._aside or rows.shape[2] < end):
            rows = self._put_aside(slot, needed)
        if rows.shape[2] + PREFILL_TOKENS_MAX > self._present_columns:
            self._make_present(rows.shape[2] + PREFILL_TOKENS_MAX)
        return rows

    def _put_aside(self, slot: int, width: int) -> npt.NDArray[Any]:
        """Keep the slot's rows in an array of their own of this width, which they fit into."""
        extent = int(self._extents[slot])
        rows = self._zeros(width, slots=1)[:, 0]
        rows[:, :, :extent] = self._rows_of(slot)[:, :, :extent]
        if slot not in self._aside:
            self._past[:, slot, :, :extent] = 0
        self._aside[slot] = rows
        return rows

    def _put_back(self, slot: int) -> None:
        extent = int(self._extents[slot])
        self._past[:, slot, :, :extent] = self._aside.pop(slot)[:, :, :extent]

    def _write(self, slot: int, rows: npt.NDArray[Any]) -> None:
        """Let these be the rows of the slot, and its only ones."""
        length = rows.shape[2]
        if length > self._rows_of(slot).shape[2]:
            self._put_aside(slot, self._width_for(length))
        self._rows_of(slot)[:, :, :length] = rows
        self._extents[slot] = max(self._extents[slot], length)
        self._clear(slot, length)

    def _lay_out(self, width: int) -> None:
        """Keep the rows in buffers of this width where they fit, else aside, and make all that depends on their
        addresses anew."""
        self._make_present(0)  # freed before the new one is there
        if width != self.width:
            for slot, extent in enumerate(self._extents.tolist()):
                if extent > width and slot not in self._aside:
                    self._put_aside(slot, self._width_for(extent))
            past = self._zeros(width, self.slots)
            for slot, extent in enumerate(self._extents.tolist()):
                if extent <= width:
                    past[:, slot, :, :extent] = self._rows_of(slot)[:, :, :extent]
                    self._aside.pop(slot, None)
            self._past = past
        aside = max((rows.shape[2] for rows in self._aside.values()), default=0)
        self._make_present(max(self.slots * (width + 1), max(width, aside) + PREFILL_TOKENS_MAX))
        self._columns = np.arange(width)
        # Of decoding. Rows begin with as many ones as _mask_lengths says; the last column is the new token's.
        self._mask: IntArray = np.zeros((self.slots, width + 1), np.int64)
        self._mask[:, width] = 1
        self._mask_lengths: IntArray = np.zeros(self.slots, np.int64)

    def _make_present(self, columns: int) -> None:
        """Let the joined output have room for so many columns of one slot. Bindings hold its address."""
        graph = self._graph
        self._run_options = onnxruntime.RunOptions()
        self._decode_bindings: dict[int, Any] = {}  # by k: at most `slots`
        self._present_columns = columns
        self._present: npt.NDArray[Any] = np.empty(0, graph.kv_type)
        self._present = np.empty(self._sides * graph.kv_heads * columns * graph.head_size, graph.kv_type)

    def _clear(self, slot: int, length: int) -> None:
        """Zero what was written from row `length` on."""
        extent = int(self._extents[slot])
        if extent > length:
            self._rows_of(slot)[:, :, length:extent] = 0
            self._extents[slot] = length

    def _present_view(self, count: int, columns: int) -> npt.NDArray[Any]:
        """[sides, count, heads, columns, head_size] of the joined output."""
        graph = self._graph
        shape = (self._sides, count, graph.kv_heads, columns, graph.head_size)
        return self._present[: int(np.prod(shape))].reshape(shape)

    def _set_mask(self, lengths: IntArray) -> None:
        """Let row i of the mask begin with lengths[i] ones. As a rule each row has grown by one since the last step."""
        count = len(lengths)
        known = self._mask_lengths[:count]
        changed = np.flatnonzero(known + 1 != lengths)
        if changed.size:
            self._mask[changed, :-1] = self._columns < lengths[changed, None]
        if changed.size < count:
            grown = np.flatnonzero(lengths)
            self._mask[self._rows[:count][grown], lengths[grown] - 1] = 1
        known[:] = lengths

    # Bindings.

    def _decode_binding(self, count: int) -> Any:
        binding = self._session.io_binding()
        self._bind_kv(binding, self._past, count, self.width, self.width + 1)
        self._bind(binding, self._graph.names.input_ids, (count, 1), self._ids)
        self._bind(binding, self._graph.names.attention_mask, (count, self.width + 1), self._mask)
        self._bind_extra(binding, (count, 1), self._positions)
        self._bind_logits(binding, (count, 1, self.vocabulary_size), self._logits)
        if self._block_outputs is not None:
            self._block_outputs.bind(binding, count)
        return binding

    def _bind_kv(self, binding: Any, rows: npt.NDArray[Any], count: int, width: int, columns: int) -> None:
        """rows: of the first of `count` slots on, by side."""
        graph = self._graph
        present = self._present_view(count, columns)
        past_shape = (count, graph.kv_heads, width, graph.head_size)
        for side, (past_name, present_name) in enumerate(graph.kv_names()):
            address = rows[side].ctypes.data
            binding.bind_input(past_name, "cpu", 0, graph.kv_type, past_shape, address)
            address = present[side].ctypes.data
            binding.bind_output(present_name, "cpu", 0, graph.kv_type, present.shape[1:], address)

    def _bind_extra(self, binding: Any, shape: tuple[int, int], positions: IntArray) -> None:
        if POSITION_IDS in self._graph.extra_inputs:
            self._bind(binding, self._graph.names.position_ids, shape, positions)
        if LOGITS_TO_KEEP in self._graph.extra_inputs:
            self._bind(binding, LOGITS_TO_KEEP, (), self._one)

    def _bind(self, binding: Any, name: str, shape: tuple[int, ...], buffer: npt.NDArray[Any]) -> None:
        binding.bind_input(name, "cpu", 0, buffer.dtype.type, shape, buffer.ctypes.data)

    def _bind_logits(self, binding: Any, shape: tuple[int, ...], buffer: npt.NDArray[Any]) -> None:
        binding.bind_output(self._graph.names.logits, "cpu", 0, self._graph.logits_type, shape, buffer.ctypes.data)
