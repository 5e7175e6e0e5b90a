"""The softmax of a tile of scores in NumPy, between the matrix products.

Tiles are float32 ``[..., rows, keys]``, contiguous. Values of rows are float32 ``[..., rows]``.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def step(scores: np.ndarray, m: np.ndarray, l: np.ndarray) -> np.ndarray:
    """Do one step of the online softmax: turn `scores` into weights relative to the new maximum, update `m` and `l`.

    Args:
        scores: The tile, with -inf for hidden scores; changed in place.
        m: The running maximum of each row; changed in place.
        l: The running sum of each row; changed in place.

    Returns:
        ``exp(m before - m after)``, the factor for the rows' accumulators.
    """
    top = np.maximum(m, scores.max(axis=-1))
    base = np.where(top == -np.inf, np.float32(0), top)  # a row without a visible key so far
    np.subtract(scores, base[..., None], out=scores)
    np.exp(scores, out=scores)
    decay = np.exp(m - base)
    l *= decay
    l += scores @ _ones(scores.shape[-1])
    m[...] = top
    return decay


def weights(scores: np.ndarray, lse: np.ndarray) -> None:
    """Turn `scores` into ``exp(scores - lse)``, in place. Hidden scores are -inf. Rows with lse = inf get zeros."""
    np.subtract(scores, lse[..., None], out=scores)
    np.exp(scores, out=scores)


def score_gradient(dweights: np.ndarray, weights: np.ndarray, delta: np.ndarray) -> None:
    """Turn `dweights`, the gradient with respect to the weights, into that with respect to the scores, in place."""
    dweights -= delta[..., None]
    dweights *= weights


@lru_cache(maxsize=8)
def _ones(n: int) -> np.ndarray:
    return np.ones(n, np.float32)
