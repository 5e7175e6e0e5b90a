"""A kernel without arithmetic: with it a call of the ring takes the time of its transfers alone."""

from __future__ import annotations

from ..core.gradients import Gradients, Rows
from ..core.online_softmax import State
from ..kernels.interface import Kernel, KernelInputs


class NoKernel(Kernel):
    """Kernel whose results are empty states and unchanged sums."""

    name = "none"

    def forward(self, inputs: KernelInputs, state: State | None = None) -> State:
        """Return the state over no further keys."""
        return State.empty(*inputs.rows, inputs.v.shape[3]) if state is None else state

    def backward(self, inputs: KernelInputs, rows: Rows, sums: Gradients) -> Gradients:
        """Return `sums`."""
        return sums
