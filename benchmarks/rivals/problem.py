"""Attention problems that all rivals solve, with their data. Needs NumPy alone: rivals run without ringattn."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

NAMES = ("out", "dq", "dk", "dv")
SAMPLED = 4  # rows of each head that are compared with float64
ENOUGH = 1e12  # floating-point operations of all repeats of a case
REPEATS = (3, 6)  # least and most


@dataclass(frozen=True)
class Problem:
    """Attention over random numbers in float32, for 2 ranks with a core each.

    Attributes:
        tokens: Length of the whole sequence.
        heads: Number of query heads.
        kv_heads: Number of key/value heads.
        dim: Head dimension.
        causal: Whether the mask is causal.
        gradient: Whether the time includes the gradient of q, k and v.
    """

    tokens: int
    heads: int
    kv_heads: int
    dim: int
    causal: bool
    gradient: bool

    @property
    def flops(self) -> float:
        """Floating-point operations of the matrix products, of visible pairs only; a gradient has 2.5 times as many."""
        pairs = self.tokens**2 / (2 if self.causal else 1)
        return 4.0 * self.heads * self.dim * pairs * (3.5 if self.gradient else 1)

    @property
    def repeats(self) -> int:
        """Number of timed calls of a fast rival in one round."""
        least, most = REPEATS
        return int(min(most, max(least, ENOUGH / self.flops)))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Numbers that problems of one piece of the measurement share."""
        return self.tokens, self.heads, self.kv_heads, self.dim

    def label(self) -> str:
        """Description in one cell of a table."""
        mask = "causal" if self.causal else "full"
        return f"{self.tokens // 1024}K, {self.heads}/{self.kv_heads} x {self.dim}, {mask}"

    def kind(self) -> str:
        """Description of what a library must be able to do, at any size."""
        grouped = "grouped heads" if self.heads != self.kv_heads else ""
        names = ("causal" if self.causal else "full", "gradient" if self.gradient else "", grouped)
        return ", ".join(filter(None, names))

    def as_dict(self) -> dict[str, Any]:
        """Fields as JSON."""
        return asdict(self)

    def arrays(self) -> list[np.ndarray]:
        """q, k, v and the gradient of `out`, float32 ``[heads, tokens, dim]``, the same on any rank."""
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        return [
            np.random.default_rng(seed).standard_normal((h, self.tokens, self.dim), np.float32)
            for seed, h in enumerate(heads)
        ]


def contiguous(tokens: int, rank: int, size: int) -> np.ndarray:
    """Positions of a rank that holds one piece of the sequence."""
    return np.arange(tokens * rank // size, tokens * (rank + 1) // size)


def exact_rows(problem: Problem, rows: np.ndarray) -> np.ndarray:
    """`out` at some positions in float64 ``[heads, rows, dim]``."""
    q, k, v, _ = problem.arrays()
    group = problem.heads // problem.kv_heads
    found = np.zeros((problem.heads, len(rows), problem.dim))
    for head in range(problem.heads):
        keys, values = (x[head // group].astype(np.float64) for x in (k, v))
        scores = q[head, rows].astype(np.float64) @ keys.T * problem.dim**-0.5
        if problem.causal:
            scores[np.arange(problem.tokens) > rows[:, None]] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        found[head] = weights @ values / weights.sum(-1, keepdims=True)
    return found


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, of the largest expected value; infinite for NaN."""
    error = np.abs(found - expected).max() / np.abs(expected).max()
    return float(error) if np.isfinite(error) else float("inf")
