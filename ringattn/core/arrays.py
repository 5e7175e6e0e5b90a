"""NumPy views that share the memory of mx arrays, and conversion of tiles to float32."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np


def view(x: mx.array) -> np.ndarray:
    """Evaluate `x` and return a NumPy array on the same memory, with its strides. bfloat16 gives its bits as uint16."""
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x, copy=False)


def read_only(x: np.ndarray) -> np.ndarray:
    """Make `x` an array that nobody can write to, so that results for it can be kept."""
    x.flags.writeable = False
    return x


def _new(shape: tuple[int, ...]) -> np.ndarray:
    return np.empty(shape, np.float32)


def as_float32(tile: np.ndarray, scratch: Callable[[tuple[int, ...]], np.ndarray] = _new) -> np.ndarray:
    """Return `tile` in float32: itself where it is, else a copy in the array that `scratch` makes for its shape."""
    if tile.dtype == np.float32:
        return tile
    out = scratch(tile.shape)
    if tile.dtype == np.uint16:  # bfloat16 is the upper half of a float32
        np.left_shift(tile, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(out, tile)
    return out
