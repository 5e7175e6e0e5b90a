"""NumPy views of mx arrays that share their memory, and tiles of them as float32."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np


def view(x: mx.array) -> np.ndarray:
    """`x`, evaluated, as a NumPy array on the same memory, strides kept; bfloat16 comes out as its bits, uint16."""
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x, copy=False)


def _new(shape: tuple[int, ...]) -> np.ndarray:
    return np.empty(shape, np.float32)


def as_float32(tile: np.ndarray, scratch: Callable[[tuple[int, ...]], np.ndarray] = _new) -> np.ndarray:
    """`tile` in float32: itself if it is, otherwise converted into what `scratch` gives for its shape."""
    if tile.dtype == np.float32:
        return tile
    out = scratch(tile.shape)
    if tile.dtype == np.uint16:  # bfloat16: the upper half of a float32
        np.left_shift(tile, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(out, tile)
    return out
