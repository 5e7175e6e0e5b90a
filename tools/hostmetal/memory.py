"""Memory of buffers: each has its own mapping with gaps around it, so that no overrun reaches another buffer."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

GAP = 1 << 16  # bytes before and after a buffer
COPIED_BELOW = 256 << 20  # bytes: larger inputs that are raw memory are used in place
POISONED_BELOW = 64 << 20  # bytes: larger outputs are not initialised, so that they take no memory
NORESERVE = 0x4000  # of mmap on Linux: Python 3.10 has no name for it


@dataclass
class Mapping:
    """Raw memory: the target of a kernel's pointer (`start`), and the span around it that the kernel may access."""

    owner: object
    start: int
    base: int
    size: int


def anonymous(size: int) -> tuple[np.ndarray, int]:
    """Allocate `size` bytes of zeros between two gaps. Return them and the address of the first."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    whole = np.frombuffer(mmap.mmap(-1, size + 2 * GAP, flags=flags), np.uint8)
    inside = whole[GAP : GAP + size]
    return inside, inside.ctypes.data


def span(array: np.ndarray) -> tuple[int, int]:
    """Return the address of the first byte of a strided array, and the number of bytes up to the last one."""
    start = array.__array_interface__["data"][0]
    if array.size == 0:
        return start, 0
    reach = [stride * (n - 1) for stride, n in zip(array.strides, array.shape)]
    low, high = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0)
    return start + low, high - low + array.itemsize


def map_input(array: np.ndarray) -> Mapping:
    """Map an input: a copy of its whole span, or the array itself where that is large."""
    low, size = span(array)
    start = array.__array_interface__["data"][0]
    if size >= COPIED_BELOW:
        return Mapping(array, start, low, size)
    inside, base = anonymous(max(size, 1))
    if size:
        raw = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint8 * size).from_address(low))
        inside[:size] = raw
    return Mapping(inside, base + start - low, base, size)


def map_output(dtype: np.dtype, shape: tuple[int, ...], init: float | None) -> tuple[np.ndarray, Mapping]:
    """Map a new output. A large one takes memory only where it is accessed."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    inside, base = anonymous(max(size, 1))
    if size < POISONED_BELOW:
        inside[:] = 0xFF  # NaN for floats
    return inside[:size].view(dtype).reshape(shape), Mapping(inside, base, base, size)


def raw_view(array: mx.array) -> np.ndarray:
    """View the memory of an MLX array with its strides; bfloat16 as uint16."""
    return np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


RAW = {mx.bfloat16: np.dtype(np.uint16), mx.bool_: np.dtype(np.bool_)}


def raw_dtype(dtype: mx.Dtype) -> np.dtype:
    return RAW.get(dtype) or np.dtype(str(dtype).removeprefix("mlx.core."))


def to_mlx(raw: np.ndarray, dtype: mx.Dtype) -> mx.array:
    array = mx.array(raw)
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array
