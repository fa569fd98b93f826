"""Four-bit weights as com.microsoft MatMulNBits reads them: blocks along the input, one scale each, zero point 8."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

BLOCK_SIZES = (32, 128)
ZERO_POINT = 8
CHUNK_WEIGHTS = 1 << 22  # quantised at a time: temporaries take 16 MB each, whatever the matrix has


def block_count(width: int, block_size: int) -> int:
    """Blocks of one row; zeros fill the last."""
    return -(-width // block_size)


def quantise_int4(weight: FloatArray, block_size: int) -> tuple[ByteArray, FloatArray]:
    """Round to nearest in blocks. weight: float32 [outputs, inputs].

    Returns nibbles uint8 [outputs, blocks, block_size / 2], the earlier weight in the low half of a byte, and scales
    float32 [outputs, blocks]. A block's scale puts the weight of largest magnitude on the end of the range that has
    one step more: 0, which is -8, as ONNX Runtime's own quantiser does.
    """
    outputs, inputs = weight.shape
    blocks = block_count(inputs, block_size)
    nibbles = np.empty((outputs, blocks, block_size // 2), np.uint8)
    scales = np.empty((outputs, blocks), np.float32)
    rows_at_once = max(1, CHUNK_WEIGHTS // inputs)
    for first in range(0, outputs, rows_at_once):
        rows = slice(first, min(first + rows_at_once, outputs))
        part = np.zeros((rows.stop - rows.start, blocks * block_size), np.float32)
        part[:, :inputs] = weight[rows]
        values = part.reshape(-1, blocks, block_size)
        least, most = values.min(-1), values.max(-1)
        scale = np.where(most > -least, most, least) / np.float32(-ZERO_POINT)
        scales[rows] = scale
        values *= np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)[..., None]
        values += np.float32(ZERO_POINT)
        codes = np.clip(np.rint(values, out=values), 0, 15, out=values).astype(np.uint8)
        nibbles[rows] = codes[..., 0::2] | codes[..., 1::2] << 4
    return nibbles, scales
