"""The fused kernels for Apple GPUs. Unsupported inputs go to plain mx operations."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import mlx.core as mx

from ..core.gradients import Gradients, Rows
from ..core.online_softmax import State
from ..kernels import blockwise_backward
from ..kernels.gpu.buffers import MIN_ELEMENTS
from ..kernels.gpu.self_test import UnusableError
from ..kernels.interface import Kernel, KernelInputs, OutputSpec
from ..kernels.reference import ReferenceKernel
from .backward import delta, weights
from .dispatch import attend
from .tiling import MAX_HEAD_DIM


class MetalKernel(Kernel):
    """Fused kernels. Larger head dims, and inputs without a token, go to plain mx operations."""

    name = "metal"

    def forward(self, inputs: KernelInputs, state: State | None = None) -> State:
        if _fused(inputs):
            before = None if state is None else State(_wide(state.acc), state.m, state.l)
            with suppress(UnusableError):
                acc, m, l = attend(_widened(inputs), before, None)
                return State(acc[..., : inputs.v.shape[3]], m, l)
        return _reference.forward(inputs, state)

    def finish(
        self, inputs: KernelInputs, output: OutputSpec, state: State | None = None
    ) -> tuple[mx.array, mx.array | None]:
        if state is not None:
            return super().finish(inputs, output, state)
        if _fused(inputs):
            sinks = None if output.sinks is None else mx.contiguous(output.sinks.astype(mx.float32))
            with suppress(UnusableError):
                out, *lse = attend(_widened(inputs), None, replace(output, sinks=sinks))
                return out[..., : inputs.v.shape[3]], lse[0] if lse else None
        return _reference.finish(inputs, output)

    def rows(self, out: mx.array, lse: mx.array, dout: mx.array, dlse: mx.array) -> Rows:
        if lse.size == 0:
            return Rows.of(out, lse, dout, dlse)
        return Rows(dout, mx.where(lse == -mx.inf, mx.inf, lse), delta(out, lse, dout, dlse))

    def backward(self, inputs: KernelInputs, rows: Rows, sums: Gradients) -> Gradients:
        return blockwise_backward.gradient(inputs, rows, sums, weights)


_reference = ReferenceKernel()


def _fused(inputs: KernelInputs) -> bool:
    """Return whether the fused kernels support these inputs."""
    q, k, v = inputs.q, inputs.k, inputs.v
    return max(q.shape[3], v.shape[3]) <= MAX_HEAD_DIM and 0 not in (q.size, k.size, v.size)


def _widened(inputs: KernelInputs) -> KernelInputs:
    return replace(inputs, q=_wide(inputs.q), k=_wide(inputs.k), v=_wide(inputs.v))


def _wide(x: mx.array) -> mx.array:
    """Pad head_dim to at least `MIN_ELEMENTS`. MLX passes smaller arrays to a kernel in another address space."""
    return x if x.shape[3] >= MIN_ELEMENTS else mx.pad(x, [(0, 0)] * 3 + [(0, MIN_ELEMENTS - x.shape[3])])
