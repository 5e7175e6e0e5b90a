"""What happens to a tile of scores between the matrix products: compiled where the installation could, else NumPy.

NumPy takes four passes over a tile, and without AVX-512 its exp alone costs as much as a third of both matrix products;
``softmax.c`` needs one pass. It is built by ``pip install`` if there is a C compiler, and nothing needs it.

Tiles are float32 ``[..., rows, keys]``, contiguous; what belongs to rows is float32 ``[..., rows]``.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..native import load

POINTER, INT = ctypes.c_void_p, ctypes.c_int64
FUNCTIONS = {
    "ringattn_softmax_step": [POINTER, INT, INT, POINTER, POINTER, POINTER],
    "ringattn_weights": [POINTER, INT, INT, POINTER],
    "ringattn_by_scores": [POINTER, POINTER, INT, INT, POINTER],
}


def step(scores: np.ndarray, m: np.ndarray, l: np.ndarray) -> np.ndarray:
    """One step of the online softmax: turn `scores` into weights relative to the new maximum, update `m` and `l`.

    Args:
        scores: The tile, hidden scores are -inf; changed in place.
        m: Running maximum of each row; changed in place.
        l: Running sum of each row; changed in place.

    Returns:
        ``exp(m before - m after)``, what the rows' accumulators have to be multiplied with.
    """
    library = compiled()
    if library is None:
        top = np.maximum(m, scores.max(axis=-1))
        base = np.where(top == -np.inf, np.float32(0), top)  # a row that has seen nothing yet
        np.subtract(scores, base[..., None], out=scores)
        np.exp(scores, out=scores)
        decay = np.exp(m - base)
        l *= decay
        l += scores @ _ones(scores.shape[-1])
        m[...] = top
        return decay
    rows_m, rows_l = np.ascontiguousarray(m), np.ascontiguousarray(l)
    decay = np.empty(m.shape, np.float32)
    state = _address(rows_m), _address(rows_l), _address(decay)
    library.ringattn_softmax_step(_address(scores), m.size, scores.shape[-1], *state)
    if rows_m is not m:  # strided rows: these were copies
        m[...], l[...] = rows_m, rows_l
    return decay


def weights(scores: np.ndarray, lse: np.ndarray) -> None:
    """Turn `scores` into ``exp(scores - lse)``, in place; hidden ones are -inf, and rows with lse = inf get zeros."""
    library = compiled()
    if library is None:
        np.subtract(scores, lse[..., None], out=scores)
        np.exp(scores, out=scores)
    else:
        lse = np.ascontiguousarray(lse)
        library.ringattn_weights(_address(scores), lse.size, scores.shape[-1], _address(lse))


def by_scores(by_weights: np.ndarray, weights: np.ndarray, delta: np.ndarray) -> None:
    """Turn `by_weights`, the loss's gradient by the weights, into that by the scores, in place."""
    library = compiled()
    if library is None:
        by_weights -= delta[..., None]
        by_weights *= weights
    else:
        delta = np.ascontiguousarray(delta)
        tiles = _address(by_weights), _address(weights)
        library.ringattn_by_scores(*tiles, delta.size, weights.shape[-1], _address(delta))


@lru_cache(maxsize=8)
def _ones(n: int) -> np.ndarray:
    return np.ones(n, np.float32)


def _address(x: np.ndarray) -> int:
    return x.__array_interface__["data"][0]  # half the time that x.ctypes takes


@lru_cache(maxsize=1)
def compiled() -> ctypes.CDLL | None:
    """``softmax.c``; ``None`` where it was not built."""
    return load(Path(__file__).with_name("_softmax"), FUNCTIONS)
