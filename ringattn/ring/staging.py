"""Blocks on their way between an NVIDIA GPU and the host, where messages travel through the host.

A view of an MLX array on the host moves its memory there, page by page, at about 1 GB/s. Copies to and from pinned
memory run at the speed of the bus. The pinned memory is kept for the next call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np

from ..core.intervals import Spans
from ..native.cuda import Driver, driver
from .blocks import Block

_NUMPY = {mx.bfloat16: np.uint16, mx.bool_: np.bool_}  # others have the same names


@dataclass(frozen=True)
class HostBlock(Block):
    """A block whose arrays are of NumPy, in pinned memory.

    Attributes:
        dtypes: The dtype of each array in MLX.
        gpu: The GPU that the block belongs to.
    """

    dtypes: tuple[mx.Dtype, ...]
    gpu: Driver

    def like(self, arrays: Sequence[Any], spans: Spans) -> Block:
        return HostBlock(tuple(arrays), self.axes, spans, self.dtypes, self.gpu)

    def empty(self, i: int, shape: Sequence[int]) -> Any:
        return _pinned(self.gpu, shape, self.dtypes[i])


def to_host(block: Block) -> Block:
    """Copy a block of this rank's GPU to pinned memory; elsewhere return `block`, which views can reach."""
    gpu = driver()
    if gpu is None or isinstance(block, HostBlock):
        return block
    arrays = [mx.contiguous(x) for x in block.arrays]
    copies = tuple(_pinned(gpu, x.shape, x.dtype) for x in arrays)
    gpu.copy_all(_addresses(copies), gpu.locate(arrays)[1](), [x.nbytes for x in arrays])
    return HostBlock(copies, block.axes, block.spans, tuple(x.dtype for x in arrays), gpu)


def from_host(block: Block) -> Block:
    """Copy a block in pinned memory to its GPU; return other blocks as they are."""
    if not isinstance(block, HostBlock):
        return block
    arrays, places = block.gpu.allocate([(x.shape, dtype) for x, dtype in zip(block.arrays, block.dtypes)])
    sources = [np.ascontiguousarray(x) for x in block.arrays]
    block.gpu.copy_all(places(), _addresses(sources), [x.nbytes for x in sources])
    return Block(tuple(arrays), block.axes, block.spans)


def _addresses(arrays: Sequence[np.ndarray]) -> list[int]:
    return [x.ctypes.data for x in arrays]


def _pinned(gpu: Driver, shape: Sequence[int], dtype: mx.Dtype) -> np.ndarray:
    kind = np.dtype(_NUMPY.get(dtype) or str(dtype).rpartition(".")[2])
    count = prod(shape) * kind.itemsize
    return np.frombuffer(gpu.pinned(count), np.uint8, count).view(kind).reshape(shape)
