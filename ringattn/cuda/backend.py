"""The fused kernels for NVIDIA GPUs; what they do not do goes to plain mx operations."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import mlx.core as mx

from ..core.gradients import Gradients, Rows
from ..core.online_softmax import State
from ..kernels.gpu.self_test import UnusableError
from ..kernels.interface import Kernel, KernelInputs, OutputSpec
from ..kernels.reference import ReferenceKernel
from .dispatch import attend
from .gradient import gradient
from .gradient import rows as rows_by_kernel
from .tiling import MOST_BLOCKS, MOST_DIMS


class CudaKernel(Kernel):
    """Fused kernels; larger head dims, and inputs without a token, go to plain mx operations."""

    name = "cuda"

    def forward(self, inputs: KernelInputs, state: State | None = None) -> State:
        if _fused(inputs):
            with suppress(UnusableError):
                return State(*attend(inputs, state, None))
        return _reference.forward(inputs, state)

    def finish(
        self, inputs: KernelInputs, output: OutputSpec, state: State | None = None
    ) -> tuple[mx.array, mx.array | None]:
        if _fused(inputs):
            sinks = None if output.sinks is None else mx.contiguous(output.sinks.astype(mx.float32))
            with suppress(UnusableError):
                out, *lse = attend(inputs, state, replace(output, sinks=sinks))
                return out, lse[0] if lse else None
        return _reference.finish(inputs, output, state)

    def rows(self, out: mx.array, lse: mx.array, dout: mx.array, dlse: mx.array) -> Rows:
        return Rows.of(out, lse, dout, dlse) if out.size == 0 else rows_by_kernel(out, lse, dout, dlse)

    def backward(self, inputs: KernelInputs, rows: Rows, sums: Gradients) -> Gradients:
        if _fused(inputs):
            with suppress(UnusableError):
                return gradient(inputs, rows, sums)
        return _reference.backward(inputs, rows, sums)

    def gradients(self, inputs: KernelInputs, rows: Rows) -> Gradients:
        if _fused(inputs):
            with suppress(UnusableError):
                return gradient(inputs, rows)
        return _reference.gradients(inputs, rows)


_reference = ReferenceKernel()


def _fused(inputs: KernelInputs) -> bool:
    """Whether the kernels can do this."""
    q, k, v = inputs.q, inputs.k, inputs.v
    if max(q.shape[3], v.shape[3]) > MOST_DIMS or max(q.shape[:2]) > MOST_BLOCKS:
        return False
    return 0 not in (q.size, k.size, v.size)
