"""Problems for the kernels for NVIDIA GPUs."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ringattn.core.gradients import Gradients
from ringattn.core.masks import Band
from ringattn.core.online_softmax import State
from ringattn.core.rules import ScoreRules
from ringattn.cuda.backend import CudaKernel
from ringattn.kernels.interface import KernelInputs, OutputSpec

BATCH = 2


@dataclass(frozen=True)
class Problem:
    """A problem for the kernels, all of whose numbers are 0.

    Attributes:
        dtype: The dtype of q, k and v.
        dims: The dims of keys, and of values.
        q_len: The number of queries.
        k_len: The number of keys: so many that the stages of a kernel are used again.
        heads: The numbers of heads of queries, and of keys.
        high: The upper bound of the band; 0 is a causal mask.
        softcap: That of the rules.
        mask: The mask's dtype, or ``None``.
        columns: Whether the mask has columns of its own.
        segments: Whether there are segments.
        state: Whether to begin with a state.
        out: The output's dtype, or ``None`` to end in a state.
        lse: Whether the log-sum-exp is an output.
        sinks: Whether there are sinks.
        gradient: Whether to compute the gradient, and not the results.
        sums: Whether to add the gradient to sums.
    """

    dtype: mx.Dtype = mx.bfloat16
    dims: tuple[int, int] = (128, 128)
    q_len: int = 700
    k_len: int = 700
    heads: tuple[int, int] = (4, 2)
    high: int | None = None
    softcap: float | None = None
    mask: mx.Dtype | None = None
    columns: bool = False
    segments: bool = False
    state: bool = False
    out: mx.Dtype | None = None
    lse: bool = False
    sinks: bool = False
    gradient: bool = False
    sums: bool = False

    def run(self) -> list[mx.array]:
        """Run the kernels, and return their results, which may be lazy."""
        kernel, inputs = CudaKernel(), self.inputs()
        rows = inputs.rows
        state = State(mx.zeros((*rows, self.dims[1])), mx.zeros(rows), mx.zeros(rows)) if self.state else None
        if self.gradient:
            dout, numbers = mx.zeros((*rows, self.dims[1]), self.dtype), mx.zeros(rows)
            found = kernel.rows(dout, numbers, dout, numbers)
            sums = Gradients.zeros(inputs.q, inputs.k, inputs.v, inputs.rules)
            gradients = kernel.backward(inputs, found, sums) if self.sums else kernel.gradients(inputs, found)
            return [x for x in gradients if x is not None]
        if self.out is None:
            return [*kernel.forward(inputs, state)]
        sinks = mx.zeros(self.heads[0]) if self.sinks else None
        results = kernel.finish(inputs, OutputSpec(self.out, self.lse, sinks), state)
        return [x for x in results if x is not None]

    def inputs(self) -> KernelInputs:
        """The arrays, positions and rules."""
        lengths = self.q_len, self.k_len
        shapes = (
            (self.heads[0], self.q_len, self.dims[0]),
            (self.heads[1], self.k_len, self.dims[0]),
            (self.heads[1], self.k_len, self.dims[1]),
        )
        mask = None if self.mask is None else mx.zeros((1, 1, *lengths), self.mask)
        columns = np.arange(self.k_len) if self.columns else None
        q_ids, k_ids = (mx.zeros((BATCH, length), mx.int32) for length in lengths)
        segments = (q_ids, k_ids) if self.segments else None
        return KernelInputs(
            *(mx.zeros((BATCH, *shape), self.dtype) for shape in shapes),
            *(np.arange(length, dtype=np.int32) for length in lengths),
            ScoreRules(0.1, Band(None, self.high), self.softcap, mask, columns, segments),
        )
