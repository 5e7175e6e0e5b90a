"""Parts that the calls of all kernels of the gradient share."""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx
import numpy as np

from ..core.gradients import Rows
from ..kernels.gpu.buffers import rule_switches
from ..kernels.interface import KernelInputs
from . import source
from .calls import kernel_call, on_gpu
from .launch import KernelCall


class Tiles(Protocol):
    """Sizes that a tiling of any of these kernels has; upper-case names are those in the kernel."""

    @property
    def BD(self) -> int: ...  # noqa: N802

    @property
    def BV(self) -> int: ...  # noqa: N802

    @property
    def warps(self) -> int: ...

    @property
    def threads(self) -> int: ...

    @property
    def shared_memory(self) -> int: ...


def longest_first(reach: np.ndarray) -> np.ndarray:
    """The order of the tiles in `reach` by how many tiles they see."""
    return np.argsort(reach[:, 0] - reach[:, 3], kind="stable")


def mask_output(inputs: KernelInputs) -> dict[str, tuple[int, ...]]:
    """The output for the gradient of an additive mask, by its name, if there is one."""
    mask = inputs.rules.mask
    return {} if mask is None or mask.dtype == mx.bool_ else {"dmask": (*inputs.rows, inputs.k.shape[2])}


def arrays_of(inputs: KernelInputs, rows: Rows) -> dict[str, mx.array]:
    """The inputs of these kernels that are arrays of the problem."""
    return {"queries": inputs.q, "keys": inputs.k, "values": inputs.v, **rows._asdict()}


def gradient_call(
    kernel: str,
    parts: tuple[str, ...],
    inputs: KernelInputs,
    rows: Rows,
    tiling: Tiles,
    buffers: dict[str, mx.array],
    defines: dict[str, int | str],
    outputs: dict[str, tuple[int, ...]],
    blocks: tuple[int, int, int],
    dtype: mx.Dtype = mx.float32,
) -> KernelCall:
    """The call of a kernel of the gradient.

    Args:
        kernel: Its name.
        parts: Headers that not all of these kernels have.
        inputs: `whole` inputs with at least one query and one key; q, k and v contiguous.
        rows: Their rows; dout in the dtype of q, all contiguous.
        tiling: Their tiling.
        buffers: Inputs of this kernel, with those of the rules.
        defines: Macros of this kernel.
        outputs: Shapes of the outputs.
        blocks: The number of thread blocks in x, y and z.
        dtype: Of the outputs; the gradient of a mask is float32.
    """
    q, v, rules = inputs.q, inputs.v, inputs.rules
    every = {
        **arrays_of(inputs, rows),
        "numbers": on_gpu(np.array([rules.scale, rules.softcap or 0.0], np.float32)),
        **buffers,
    }
    macros: dict[str, int | str] = {
        "T": source.TYPES[q.dtype],
        "MATRIX": int(q.dtype.size == 2),
        "BFLOAT": int(q.dtype == mx.bfloat16),
        "D": q.shape[3],
        "DV": v.shape[3],
        "BD": tiling.BD,
        "BV": tiling.BV,
        "WARPS": tiling.warps,
        **defines,
        "SOFTCAP": int(rules.softcap is not None),
        **rule_switches(rules, every),
    }
    return kernel_call(
        kernel,
        ("tiles", "softmax", "segments", "odd", *parts),
        macros,
        every,
        blocks=blocks,
        threads=tiling.threads,
        shared_memory=tiling.shared_memory,
        output_names=list(outputs),
        output_shapes=list(outputs.values()),
        output_dtypes=[mx.float32 if name == "dmask" else dtype for name in outputs],
        init_value=0.0 if "dmask" in outputs else None,  # tiles that nobody sees are not written
    )
