"""NumPy views of mx arrays that share their memory, and tiles of them as float32."""

from __future__ import annotations

import mlx.core as mx
import numpy as np


def view(x: mx.array) -> np.ndarray:
    """`x`, evaluated, as a NumPy array on the same memory, strides kept; bfloat16 comes out as its bits, uint16."""
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x, copy=False)


def as_float32(tile: np.ndarray, scratch: np.ndarray) -> np.ndarray:
    """`tile` in float32: itself if it is, otherwise converted into the front of the flat `scratch`."""
    if tile.dtype == np.float32:
        return tile
    out = scratch[: tile.size].reshape(tile.shape)
    if tile.dtype == np.uint16:  # bfloat16: the upper half of a float32
        np.left_shift(tile, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(out, tile)
    return out
