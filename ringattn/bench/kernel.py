"""The fused kernel against MLX's own attention on the same arrays."""

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

SAMPLED = 8  # rows that are checked against float64
SAMPLE = 0.02  # seconds at least of what is timed at once,
MOST_CALLS = 50  # unless that are too many calls
PAUSE = 0.02  # seconds before each sample


@dataclass(frozen=True)
class Shape:
    """One problem.

    Attributes:
        dtype: Of q, k and v.
        head_dim: Of all three.
        heads: Query heads and key/value heads.
        queries: Query tokens; they are the last of the keys' tokens.
        keys: Key tokens.
        causal: Whether the mask is causal.
        lse: Whether the log-sum-exp is asked for too.
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
        """Floating-point operations of the two matrix products, of visible pairs alone."""
        hidden = self.queries * (self.queries - 1) / 2 if self.causal else 0
        return 4.0 * self.heads[0] * self.head_dim * (self.queries * self.keys - hidden)


@dataclass(frozen=True)
class Timing:
    """What was measured.

    Attributes:
        ours: Median seconds of `ringattn.attention`; NaN where its answer is wrong.
        mlx: Median seconds of ``mx.fast.scaled_dot_product_attention``; likewise.
        error: The largest error of sampled rows of ours against float64, or half the largest distance between ours and
            MLX's in any row if that is more, as a fraction of what is allowed (see `ringattn verify`).
    """

    ours: float
    mlx: float
    error: float


def measure(shape: Shape, backend: str | None, repeats: int) -> Timing:
    """Check what `ringattn.attention` computes, then time it; a wrong answer is not timed.

    Args:
        shape: The problem.
        backend: As of `ringattn.attention`.
        repeats: The median is of so many samples; a sample is several calls at once where one is too short.
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
    """`count` independent calls, evaluated together: waiting for the GPU costs more than a small call."""
    return lambda: mx.eval([call() for _ in range(count)])


def random_arrays(shape: Shape) -> tuple[mx.array, mx.array, mx.array]:
    """q, k and v of a problem, the same numbers every time."""
    keys = [mx.random.key(seed) for seed in range(3)]
    sizes = [(shape.heads[0], shape.queries), (shape.heads[1], shape.keys), (shape.heads[1], shape.keys)]
    q, k, v = (
        mx.random.normal((1, heads, tokens, shape.head_dim), key=key).astype(shape.dtype)
        for key, (heads, tokens) in zip(keys, sizes)
    )
    mx.eval(q, k, v)
    return q, k, v


def sampled_error(shape: Shape, q: mx.array, k: mx.array, v: mx.array, out: mx.array, lse: mx.array | None) -> float:
    """The largest error of some rows of `out`, and of `lse` where it is given, as a fraction of what is allowed."""
    worst = 0.0
    for heads, at, case in _samples(shape, q, k, v):
        exact = mx.array(case.exact()[1].astype(np.float32)) if lse is None else lse[:, heads][:, :, at]
        worst = max(worst, *ratios(case, out[:, heads][:, :, at], exact))
    return worst


def _distance(shape: Shape, q: mx.array, k: mx.array, v: mx.array, out: mx.array, other: mx.array) -> float:
    """The largest distance of any number of `out` from `other`, as a fraction of what each of the two is allowed."""
    allowed = max(case.budget()[0] for _, _, case in _samples(shape, q, k, v))
    distance = float(np.array(mx.abs(out.astype(mx.float32) - other.astype(mx.float32)).max()))
    return math.inf if math.isnan(distance) else distance / (2 * allowed)


def _samples(shape: Shape, q: mx.array, k: mx.array, v: mx.array) -> Iterator[tuple[slice, mx.array, Case]]:
    """Some rows of the heads of the first and the last key/value head: heads, rows, and the problem that they are."""
    group = shape.heads[0] // shape.heads[1]
    rows = np.unique(np.linspace(0, shape.queries - 1, SAMPLED).astype(int))
    at, mask = mx.array(rows), "causal" if shape.causal else None
    q_pos, k_pos = rows + shape.keys - shape.queries, np.arange(shape.keys)
    for head in sorted({0, shape.heads[1] - 1}):
        heads, of_k = slice(head * group, (head + 1) * group), slice(head, head + 1)
        yield heads, at, Case(q[:, heads][:, :, at], k[:, of_k], v[:, of_k], q_pos, k_pos, {"mask": mask})
