"""Timing of the fused kernel against MLX's own attention on the same arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..attention import attention
from ..verify.oracle import Case, ratios
from .timing import medians

CHECKED_ROWS = 8  # are compared with float64
SAMPLE = 0.02  # s of a sample at least
MOST_CALLS = 50  # in a sample
PAUSE = 0.02  # s before each sample


@dataclass(frozen=True)
class AttentionShape:
    """Problem to time.

    Attributes:
        dtype: Dtype of q, k and v.
        head_dim: Head dimension of q, k and v.
        heads: Numbers of query heads and of key/value heads.
        queries: Number of query tokens, which are the last of the key tokens.
        keys: Number of key tokens.
        causal: Whether the mask is causal.
        lse: Whether the call also returns the log-sum-exp.
    """

    dtype: mx.Dtype
    head_dim: int
    heads: tuple[int, int]
    queries: int
    keys: int
    causal: bool
    lse: bool = False

    @property
    def flops(self) -> float:
        """Floating-point operations of the two matrix products, for visible pairs only."""
        hidden = self.queries * (self.queries - 1) / 2 if self.causal else 0
        return 4.0 * self.heads[0] * self.head_dim * (self.queries * self.keys - hidden)


@dataclass(frozen=True)
class Timing:
    """Result of a measurement.

    Attributes:
        ours: Median seconds of `ringattn.attention`; NaN if its answer is wrong.
        mlx: Median seconds of ``mx.fast.scaled_dot_product_attention``; NaN if the answer of ringattn is wrong.
        error: Largest error of some rows against float64, or half the largest difference from MLX in any row if that is
            more, as a fraction of the allowed error (see `ringattn verify`).
    """

    ours: float
    mlx: float
    error: float


def measure(shape: AttentionShape, backend: str | None, repeats: int) -> Timing:
    """Check the answer of `ringattn.attention`, then time the call. A wrong answer is not timed.

    Args:
        shape: Problem to time.
        backend: Argument of `ringattn.attention`.
        repeats: Number of samples. A sample has several calls if one call is too short.
    """
    q, k, v = random_arrays(shape)
    mask = "causal" if shape.causal else None

    def ours() -> Any:
        return attention(q, k, v, mask=mask, backend=backend, return_lse=shape.lse)

    def theirs() -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=shape.head_dim**-0.5, mask=mask)

    out, lse = ours() if shape.lse else (ours(), None)
    error = max(sampled_error(shape, q, k, v, out, lse), _distance(shape, q, k, v, out, theirs()))
    if not error <= 1:
        return Timing(math.nan, math.nan, error)
    once = medians({"ours": _burst(ours, 1), "mlx": _burst(theirs, 1)}, 1)
    count = max(1, min(MOST_CALLS, int(SAMPLE / min(once.values()))))
    seconds = medians({"ours": _burst(ours, count), "mlx": _burst(theirs, count)}, repeats, pause=PAUSE)
    return Timing(seconds["ours"] / count, seconds["mlx"] / count, error)


def _burst(call: Callable[[], Any], count: int) -> Callable[[], None]:
    """Join `count` independent calls into one evaluation, since waiting for the GPU takes longer than a small call."""
    return lambda: mx.eval([call() for _ in range(count)])


def random_arrays(shape: AttentionShape) -> tuple[mx.array, mx.array, mx.array]:
    """Draw q, k and v of a problem, the same numbers in every call."""
    keys = [mx.random.key(seed) for seed in range(3)]
    sizes = [(shape.heads[0], shape.queries), (shape.heads[1], shape.keys), (shape.heads[1], shape.keys)]
    q, k, v = (
        mx.random.normal((1, heads, tokens, shape.head_dim), key=key).astype(shape.dtype)
        for key, (heads, tokens) in zip(keys, sizes)
    )
    mx.eval(q, k, v)
    return q, k, v


def sampled_error(
    shape: AttentionShape, q: mx.array, k: mx.array, v: mx.array, out: mx.array, lse: mx.array | None
) -> float:
    """Largest error of some rows of `out`, and of `lse` if given, as a fraction of the allowed error."""
    worst = 0.0
    for heads, at, case in _samples(shape, q, k, v):
        exact = mx.array(case.exact()[1].astype(np.float32)) if lse is None else lse[:, heads][:, :, at]
        worst = max(worst, *ratios(case, out[:, heads][:, :, at], exact))
    return worst


def _distance(shape: AttentionShape, q: mx.array, k: mx.array, v: mx.array, out: mx.array, other: mx.array) -> float:
    """Largest difference between `out` and `other`, as a fraction of the sum of their allowed errors."""
    allowed = max(case.budget()[0] for _, _, case in _samples(shape, q, k, v))
    distance = float(np.array(mx.abs(out.astype(mx.float32) - other.astype(mx.float32)).max()))
    return math.inf if math.isnan(distance) else distance / (2 * allowed)


def _samples(shape: AttentionShape, q: mx.array, k: mx.array, v: mx.array) -> Iterator[tuple[slice, mx.array, Case]]:
    """Yield some rows of the first and of the last key/value head: query heads, rows, and the problem of these."""
    group = shape.heads[0] // shape.heads[1]
    rows = np.unique(np.linspace(0, shape.queries - 1, CHECKED_ROWS).astype(int))
    at = mx.array(rows)
    options = {"mask": "causal" if shape.causal else None}
    q_pos = rows + shape.keys - shape.queries
    k_pos = np.arange(shape.keys)
    for head in sorted({0, shape.heads[1] - 1}):
        q_heads = slice(head * group, (head + 1) * group)
        kv_head = slice(head, head + 1)
        yield q_heads, at, Case(q[:, q_heads][:, :, at], k[:, kv_head], v[:, kv_head], q_pos, k_pos, options)
