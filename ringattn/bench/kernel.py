"""The fused kernel against MLX's own attention on the same arrays."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..attention import attention
from ..verify.oracle import Case, ratios
from .timing import medians

SAMPLED = 8  # rows that are checked against float64


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
        ours: Median seconds of `ringattn.attention`.
        mlx: Median seconds of ``mx.fast.scaled_dot_product_attention``.
        error: The larger error of sampled rows of ours, as a fraction of what is allowed (see `ringattn verify`).
    """

    ours: float
    mlx: float
    error: float


def measure(shape: Shape, backend: str | None, repeats: int) -> Timing:
    """Check sampled rows against float64, then time; a wrong answer is not timed, and its times are NaN."""
    q, k, v = random_arrays(shape)
    mask = "causal" if shape.causal else None

    def ours() -> None:
        mx.eval(attention(q, k, v, mask=mask, backend=backend, return_lse=shape.lse))

    def theirs() -> None:
        mx.eval(mx.fast.scaled_dot_product_attention(q, k, v, scale=shape.head_dim**-0.5, mask=mask))

    error = sampled_error(shape, q, k, v, *attention(q, k, v, mask=mask, backend=backend, return_lse=True))
    if not error <= 1:
        return Timing(float("nan"), float("nan"), error)
    theirs()  # as `ours` has been, it is compiled and warm
    seconds = medians({"ours": ours, "mlx": theirs}, repeats)
    return Timing(seconds["ours"], seconds["mlx"], error)


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


def sampled_error(shape: Shape, q: mx.array, k: mx.array, v: mx.array, out: mx.array, lse: mx.array) -> float:
    """The worst of some rows of the first and the last key/value head."""
    group = shape.heads[0] // shape.heads[1]
    rows = np.unique(np.linspace(0, shape.queries - 1, SAMPLED).astype(int))
    worst = 0.0
    for head in {0, shape.heads[1] - 1}:
        of_q, of_k = slice(head * group, (head + 1) * group), slice(head, head + 1)
        at = mx.array(rows)
        case = Case(
            q[:, of_q][:, :, at],
            k[:, of_k],
            v[:, of_k],
            rows + shape.keys - shape.queries,
            np.arange(shape.keys),
            {"mask": "causal" if shape.causal else None},
        )
        worst = max(worst, *ratios(case, out[:, of_q][:, :, at], lse[:, of_q][:, :, at]))
    return worst
