"""The interface of all kernels: their inputs, their results, and parts of their inputs."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import mlx.core as mx
import numpy as np

from ..core.gradients import Gradients, Rows
from ..core.kept import kept
from ..core.online_softmax import State, finish
from ..core.rules import ScoreRules


@dataclass(frozen=True)
class OutputSpec:
    """The results of a kernel that does not return its state.

    Attributes:
        dtype: The output's dtype.
        lse: Whether the log-sum-exp is returned.
        sinks: ``[Hq]``, float32, or ``None``.
    """

    dtype: mx.Dtype
    lse: bool
    sinks: mx.array | None = None


@dataclass(frozen=True)
class KernelInputs:
    """One kernel call: a block of queries, a block of keys, and the rules between them.

    Attributes:
        q: ``[B, Hq, Lq, D]``.
        k: ``[B, Hkv, Lk, D]``; Hq is a multiple of Hkv.
        v: ``[B, Hkv, Lk, Dv]``; q, k and v share one dtype.
        q_pos: Ascending int32 positions ``[Lq]``.
        k_pos: Ascending int32 positions ``[Lk]``.
        rules: Which keys a query sees, and how scores are computed.
        arrive: Waits for the numbers in the arrays, which may still be under way. A kernel calls it before it evaluates
            anything.
    """

    q: mx.array
    k: mx.array
    v: mx.array
    q_pos: np.ndarray
    k_pos: np.ndarray
    rules: ScoreRules
    arrive: Callable[[], None] = lambda: None

    @property
    def group(self) -> int:
        """Number of query heads for each key/value head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def rows(self) -> tuple[int, int, int]:
        """Shape ``[B, Hq, Lq]`` of one number for each row."""
        return self.q.shape[0], self.q.shape[1], self.q.shape[2]

    def whole(self) -> KernelInputs:
        """Broadcast the mask to every axis, by strides alone, so that `part` can cut it."""
        mask, columns = self.rules.mask, self.rules.columns
        if mask is None:
            return self
        if mask.shape[3] == 1:
            columns = None
        width = self.k.shape[2] if columns is None else mask.shape[3]
        mask = mx.broadcast_to(mask, (*self.rows, width))
        return replace(self, rules=replace(self.rules, mask=mask, columns=columns))

    def part(self, queries: slice, keys: slice) -> KernelInputs:
        """Cut these queries and keys out of `whole` inputs, as views without copies."""
        if (queries.start, queries.stop, keys.start, keys.stop) == (0, self.q.shape[2], 0, self.k.shape[2]):
            return self
        mask, columns, segments = self.rules.mask, self.rules.columns, self.rules.segments
        if mask is not None:
            mask = mask[:, :, queries] if columns is not None else mask[:, :, queries, keys]
        rules = replace(
            self.rules,
            mask=mask,
            columns=None if columns is None else _cut(columns, keys.start, keys.stop),
            segments=None if segments is None else (segments[0][:, queries], segments[1][:, keys]),
        )
        k, v = self.k[:, :, keys], self.v[:, :, keys]
        q_pos, k_pos = _cut(self.q_pos, queries.start, queries.stop), _cut(self.k_pos, keys.start, keys.stop)
        return KernelInputs(self.q[:, :, queries], k, v, q_pos, k_pos, rules, self.arrive)


@kept(most=64)
def _cut(positions: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Cut a part out of positions: the same array each time, so that what follows from it is kept, too."""
    return positions if (start, stop) == (0, len(positions)) else positions[start:stop]


class Kernel(abc.ABC):
    """Attention of a block of queries to a block of keys on one device, and its gradient.

    A kernel keeps no state between calls.
    """

    name: ClassVar[str]
    """The name of the kernel in the `backend` argument."""
    differentiable: ClassVar[bool] = False
    """Whether MLX itself can derive the gradient of `finish`."""
    lazy: ClassVar[bool] = True
    """Whether results may be left unevaluated in MLX's graph."""

    @abc.abstractmethod
    def forward(self, inputs: KernelInputs, state: State | None = None) -> State:
        """Attend and return the state ``(acc, m, l)``.

        `state` is the state over earlier keys, or ``None``. The kernel may overwrite it.
        """

    def finish(
        self, inputs: KernelInputs, output: OutputSpec, state: State | None = None
    ) -> tuple[mx.array, mx.array | None]:
        """Attend, from `state` as in `forward`, and return ``(out, lse)``.

        The lse may be ``None`` only where `output` does not ask for it.
        """
        return finish(self.forward(inputs, state), output.sinks, output.dtype)

    def rows(self, out: mx.array, lse: mx.array, dout: mx.array, dlse: mx.array) -> Rows:
        """Compute the rows for `backward`, from the results and the gradients of the loss with respect to them.

        A kernel that reads them evaluates them by `autograd.evaluation.evaluate`: they may be on their way.
        """
        return Rows.of(out, lse, dout, dlse)

    @abc.abstractmethod
    def backward(self, inputs: KernelInputs, rows: Rows, sums: Gradients) -> Gradients:
        """Add the gradients of this block of queries and keys to `sums`, which the kernel may overwrite.

        The formulas are in `ringattn.core.gradients`.
        """

    def gradients(self, inputs: KernelInputs, rows: Rows) -> Gradients:
        """Compute the gradients of a problem that is not a part of a larger one.

        Those with respect to q, k and v are float32, or already rounded to the dtype of q.
        """
        return self.backward(inputs, rows, Gradients.zeros(inputs.q, inputs.k, inputs.v, inputs.rules))
