"""What one kernel call is about: arrays, positions and rules, and how to take a part of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from ..core.online_softmax import State, finish
from ..core.rules import Rules


@dataclass(frozen=True)
class Ending:
    """What a kernel ends in where it does not end in a state.

    Attributes:
        dtype: The output's dtype.
        lse: Whether the log-sum-exp is wanted.
        sinks: ``[Hq]``, float32, or ``None``.
    """

    dtype: mx.Dtype
    lse: bool
    sinks: mx.array | None = None


@dataclass(frozen=True)
class Problem:
    """The arguments of a local kernel; see `ringattn.kernels`."""

    q: mx.array
    k: mx.array
    v: mx.array
    q_pos: np.ndarray
    k_pos: np.ndarray
    rules: Rules

    @property
    def arguments(self) -> tuple[mx.array, mx.array, mx.array, np.ndarray, np.ndarray, Rules]:
        """What a backend's `forward` takes, less the state."""
        return self.q, self.k, self.v, self.q_pos, self.k_pos, self.rules

    @property
    def group(self) -> int:
        """Query heads for each key/value head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def rows(self) -> tuple[int, int, int]:
        """The shape ``[B, Hq, Lq]`` of a number for each row."""
        return self.q.shape[0], self.q.shape[1], self.q.shape[2]

    def whole(self) -> Problem:
        """The same with a mask that spans every axis, by strides alone, so that it can be cut."""
        mask, columns = self.rules.mask, self.rules.columns
        if mask is None:
            return self
        if mask.shape[3] == 1:
            columns = None
        width = self.k.shape[2] if columns is None else mask.shape[3]
        mask = mx.broadcast_to(mask, (*self.rows, width))
        return replace(self, rules=replace(self.rules, mask=mask, columns=columns))

    def part(self, queries: slice, keys: slice) -> Problem:
        """The part of a `whole` problem that is about these queries and keys; views, not copies."""
        mask, columns, segments = self.rules.mask, self.rules.columns, self.rules.segments
        if mask is not None:
            mask = mask[:, :, queries] if columns is not None else mask[:, :, queries, keys]
        rules = replace(
            self.rules,
            mask=mask,
            columns=None if columns is None else columns[keys],
            segments=None if segments is None else (segments[0][:, queries], segments[1][:, keys]),
        )
        k, v = self.k[:, :, keys], self.v[:, :, keys]
        return Problem(self.q[:, :, queries], k, v, self.q_pos[queries], self.k_pos[keys], rules)


def ending(forward: Callable[..., State]) -> Callable[..., tuple[mx.array, mx.array]]:
    """The `finished` of a kernel that has nothing better than to finish what its `forward` returns."""

    def finished(q, k, v, q_pos, k_pos, rules, sinks, dtype: mx.Dtype, with_lse: bool):
        return finish(forward(q, k, v, q_pos, k_pos, rules, None), sinks, dtype)

    return finished


def cleared(rules: Rules, q: mx.array, k: mx.array, v: mx.array, dout: mx.array) -> tuple[mx.array, ...]:
    """The same with zeros for padding, whose bits must not meet anything: products carry NaN even through zeros."""
    if rules.segments is None:
        return q, k, v, dout
    by_query, by_key = ((ids >= 0)[:, None, :, None] for ids in rules.segments)
    pairs = (q, by_query), (k, by_key), (v, by_key), (dout, by_query)
    return tuple(mx.where(real, x, mx.zeros((), x.dtype)) for x, real in pairs)
