"""Parts of every call: the text, the macros in front of it, and small arrays."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import numpy as np

from . import source
from .launch import KernelCall

KEPT = 256  # small arrays, the layers of a model share theirs,
LARGEST_KEPT = 1 << 14  # bytes of one
SHARED = {"numbers", "reach", "limits", "query_at", "key_at", "mask_columns"}  # inputs of `without_arrays`


def kernel_call(
    kernel: str,
    parts: tuple[str, ...],
    defines: dict,
    buffers: dict[str, mx.array],
    blocks: tuple[int, int, int],
    threads: int,
    **others,
) -> KernelCall:
    """Build the call of `kernel`, with the files `parts` and `defines` before it, on ``blocks`` of `threads`."""
    # MLX declares the buffers by their dtypes, so these belong to the text as well
    dtypes = ((f"INPUT_{name}", source.TYPES.get(x.dtype, x.dtype)) for name, x in buffers.items())
    header = source.header(parts, (*defines.items(), *dtypes))
    return KernelCall(
        name=source.name(kernel, header),
        input_names=list(buffers),
        source=source.text(f"{kernel}.cu"),
        header=header,
        inputs=list(buffers.values()),
        template=[],
        grid=(blocks[0] * threads, *blocks[1:]),
        threadgroup=(threads, 1, 1),
        **others,
    )


def without_arrays(call: KernelCall) -> KernelCall:
    """Return `call` without its inputs, but those that follow from shapes, rules and positions."""
    return call.with_inputs({name: None for name in call.input_names if name not in SHARED})


def on_gpu(x: np.ndarray) -> mx.array:
    """`x` as an array of MLX; a small one is kept, because the first use of new memory by the GPU is slow."""
    return mx.array(x) if x.nbytes > LARGEST_KEPT else _kept(x.tobytes(), x.dtype.str, x.shape)


@lru_cache(KEPT)
def _kept(data: bytes, dtype: str, shape: tuple[int, ...]) -> mx.array:
    return mx.array(np.frombuffer(data, dtype).reshape(shape))
