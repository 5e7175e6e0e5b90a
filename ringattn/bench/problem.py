"""Attention problems to time, and the check of their answers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..verify.oracle import Case, ratios

CHECKED_ROWS = 8  # are compared with float64


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

    @property
    def mask(self) -> str | None:
        """Argument `mask` of the calls."""
        return "causal" if self.causal else None

    @property
    def case(self) -> dict[str, str | int]:
        """Parameters for a `Record`."""
        return {
            "head_dim": self.head_dim,
            "tokens": self.keys,
            "heads": "{}/{}".format(*self.heads),
            "dtype": str(self.dtype).split(".")[-1],
            "mask": "causal" if self.causal else "full",
        }

    @property
    def positions(self) -> np.ndarray:
        """Positions of the queries."""
        return np.arange(self.keys - self.queries, self.keys)


Arrays = tuple[mx.array, mx.array, mx.array]


def random_arrays(shape: AttentionShape) -> Arrays:
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
    shape: AttentionShape, arrays: Arrays, positions: np.ndarray, out: mx.array, lse: mx.array | None
) -> float:
    """Largest error of some rows of `out`, and of `lse` if given, as a fraction of the allowed error.

    Args:
        shape: Problem.
        arrays: The queries of `out`, and all keys and values.
        positions: Positions of these queries.
        out: Answer.
        lse: Its log-sum-exp; ``None``: not checked.
    """
    worst = 0.0
    for heads, at, case in samples(shape, arrays, positions):
        exact = mx.array(case.exact()[1].astype(np.float32)) if lse is None else lse[:, heads][:, :, at]
        worst = max(worst, *ratios(case, out[:, heads][:, :, at], exact))
    return worst


def distance(shape: AttentionShape, arrays: Arrays, positions: np.ndarray, out: mx.array, other: mx.array) -> float:
    """Largest difference between two answers, as a fraction of the sum of their allowed errors."""
    allowed = max((case.budget()[0] for _, _, case in samples(shape, arrays, positions)), default=1.0)
    if out.size == 0:
        return 0.0
    apart = float(np.array(mx.abs(out.astype(mx.float32) - other.astype(mx.float32)).max()))
    return math.inf if math.isnan(apart) else apart / (2 * allowed)


def samples(shape: AttentionShape, arrays: Arrays, positions: np.ndarray) -> Iterator[tuple[slice, mx.array, Case]]:
    """Yield some rows of the first and of the last key/value head: query heads, rows, and the problem of these."""
    q, k, v = arrays
    if len(positions) == 0:
        return
    group = shape.heads[0] // shape.heads[1]
    rows = np.unique(np.linspace(0, len(positions) - 1, CHECKED_ROWS).astype(int))
    at = mx.array(rows)
    for head in sorted({0, shape.heads[1] - 1}):
        q_heads = slice(head * group, (head + 1) * group)
        kv_head = slice(head, head + 1)
        part = (q[:, q_heads][:, :, at], k[:, kv_head], v[:, kv_head])
        yield q_heads, at, Case(*part, positions[rows], np.arange(shape.keys), {"mask": shape.mask})
