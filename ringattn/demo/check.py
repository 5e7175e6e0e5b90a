"""Hold sampled rows of an attention output against a float64 softmax over all keys."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ringattn.comm.base import Ring
from ringattn.layout import Layout

# float32 rounds to 6e-8. A score of 50 is then off by some 3e-6, and so is its weight; the plain float32 formula on
# one device has errors of that size too. Any real mistake (a lost key, a wrong position) is thousands of times larger.
BUDGET = 1e-5


class Sample(NamedTuple):
    """Some rows of one layer on one rank, and the keys and values that this rank holds.

    `positions` is ``[rows]``, `q` and `out` are ``[heads, rows, head_dim]``, `k` and `v`
    ``[1, kv_heads, tokens, head_dim]``.
    """

    positions: np.ndarray
    q: np.ndarray
    out: np.ndarray
    k: mx.array
    v: mx.array

    @classmethod
    def take(cls, q: mx.array, k: mx.array, v: mx.array, out: mx.array, positions: np.ndarray, count: int) -> Sample:
        """Sample `count` rows: the first, the last, and others at random, the same ones in every run."""
        tokens = len(positions)
        rows = np.random.default_rng(tokens).permutation(tokens)[:count]
        rows[:2] = [0, tokens - 1][: len(rows)]
        picked = [np.array(x[0].astype(mx.float32))[:, rows] for x in (q, out)]
        return cls(positions[rows], picked[0], picked[1], k, v)


def sample_error(sample: Sample, layout: Layout, ring: Ring) -> float:
    """Largest error of a sample, relative to the largest value of all tokens. Collective: gathers k and v."""
    k, v = (np.array(layout.gather(x, ring)[0].astype(mx.float32)) for x in (sample.k, sample.v))
    group = sample.q.shape[0] // k.shape[0]
    errors = [0.0]
    for head in range(k.shape[0] if len(sample.positions) else 0):
        rows = slice(head * group, (head + 1) * group)
        exact = causal_attention(sample.q[rows], k[head], v[head], sample.positions, layout.start)
        errors.append(float(np.abs(sample.out[rows] - exact).max()))
    return float(np.max(errors)) / float(np.abs(v).max())  # np.max, unlike max, lets no NaN slip by


def causal_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray, start: int = 0) -> np.ndarray:
    """The definition in float64: `q` ``[heads, rows, D]`` at `positions`, one head's `k` and `v` ``[tokens, D]``."""
    scores = q.astype(np.float64) @ k.astype(np.float64).T * q.shape[-1] ** -0.5
    later = start + np.arange(len(k)) > positions[:, None]
    scores[:, later] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights @ v.astype(np.float64) / weights.sum(axis=-1, keepdims=True)
