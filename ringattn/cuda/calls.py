"""Parts of every call: the text, the macros in front of it, small arrays, and what is kept for equal calls."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache

import mlx.core as mx
import numpy as np

from ..core.kept import Kept
from ..kernels.interface import KernelInputs
from . import source
from .launch import KernelCall

KEPT = 256  # small arrays, the layers of a model share theirs,
LARGEST_KEPT = 1 << 14  # bytes of one
# Inputs of `without_arrays`.
SHARED = {"numbers", "reach", "tail", "order", "blocks", "limits", "query_at", "key_at", "mask_columns"}


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


_prepared: Kept[KernelCall] = Kept(64)


def prepared(kind: Hashable, inputs: KernelInputs, make: Callable[[], KernelCall]) -> KernelCall:
    """Return the call that `make` builds for `inputs`, or one for the same shapes, rules and positions, without arrays.

    `kind` is all else that the call depends on.
    """
    positions = inputs.q_pos, inputs.k_pos, inputs.rules.columns
    return _prepared.get((kind, problem(inputs)), positions, lambda: without_arrays(make()))


def problem(inputs: KernelInputs) -> Hashable:
    """Name all that the kernels for `inputs` depend on, but for positions."""
    rules, mask = inputs.rules, inputs.rules.mask
    return (
        (inputs.q.shape, inputs.k.shape, inputs.v.shape, inputs.q.dtype),
        (rules.scale, rules.band, rules.softcap, rules.segments is None),
        None if mask is None else (mask.shape, mask.dtype),
    )


def on_gpu(x: np.ndarray) -> mx.array:
    """`x` as an array of MLX; a small one is kept, because the first use of new memory by the GPU is slow."""
    return mx.array(x) if x.nbytes > LARGEST_KEPT else _kept(x.tobytes(), x.dtype.str, x.shape)


@lru_cache(KEPT)
def _kept(data: bytes, dtype: str, shape: tuple[int, ...]) -> mx.array:
    return mx.array(np.frombuffer(data, dtype).reshape(shape))
