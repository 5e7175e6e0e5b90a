"""The fused kernels for CPUs."""

from __future__ import annotations

import mlx.core as mx

from ..core.gradients import Gradients, Rows
from ..core.online_softmax import State
from ..kernels.interface import Kernel, KernelInputs, OutputSpec
from . import backward, flash, forward


class HostKernel(Kernel):
    """Compiled kernel, or NumPy and its BLAS where there was no compiler, on the memory of the mx arrays."""

    name = "host"
    lazy = False

    def forward(self, inputs: KernelInputs, state: State | None = None) -> State:
        return forward.attend(inputs, state)

    def finish(
        self, inputs: KernelInputs, output: OutputSpec, state: State | None = None
    ) -> tuple[mx.array, mx.array | None]:
        if flash.compiled() is None or state is not None:
            return super().finish(inputs, output, state)
        return forward.finish(inputs, output)

    def rows(self, out: mx.array, lse: mx.array, dout: mx.array, dlse: mx.array) -> Rows:
        return backward.rows(out, lse, dout, dlse)

    def backward(self, inputs: KernelInputs, rows: Rows, sums: Gradients) -> Gradients:
        return backward.add_gradients(inputs, rows, sums)
