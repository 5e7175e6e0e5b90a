"""The softmax of a tile of scores, between the matrix products: in C where it was compiled, else in NumPy.

NumPy takes four passes over a tile, and without AVX-512 its exp alone costs a third of both matrix products.
``softmax.c`` takes one pass. ``pip install`` compiles it if there is a C compiler. It is optional.

Tiles are float32 ``[..., rows, keys]``, contiguous. Values of rows are float32 ``[..., rows]``.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..native import load

POINTER = ctypes.c_void_p
INT = ctypes.c_int64
FUNCTIONS = {
    "ringattn_softmax_step": [POINTER, INT, INT, POINTER, POINTER, POINTER],
    "ringattn_weights": [POINTER, INT, INT, POINTER],
    "ringattn_by_scores": [POINTER, POINTER, INT, INT, POINTER],
}


def step(scores: np.ndarray, m: np.ndarray, l: np.ndarray) -> np.ndarray:
    """Do one step of the online softmax: turn `scores` into weights relative to the new maximum, update `m` and `l`.

    Args:
        scores: The tile, with -inf for hidden scores; changed in place.
        m: The running maximum of each row; changed in place.
        l: The running sum of each row; changed in place.

    Returns:
        ``exp(m before - m after)``, the factor for the rows' accumulators.
    """
    library = compiled()
    if library is None:
        top = np.maximum(m, scores.max(axis=-1))
        base = np.where(top == -np.inf, np.float32(0), top)  # a row without a visible key so far
        np.subtract(scores, base[..., None], out=scores)
        np.exp(scores, out=scores)
        decay = np.exp(m - base)
        l *= decay
        l += scores @ _ones(scores.shape[-1])
        m[...] = top
        return decay
    rows_m = np.ascontiguousarray(m)
    rows_l = np.ascontiguousarray(l)
    decay = np.empty(m.shape, np.float32)
    state = _address(rows_m), _address(rows_l), _address(decay)
    library.ringattn_softmax_step(_address(scores), m.size, scores.shape[-1], *state)
    if rows_m is not m:  # strided rows: these were copies
        m[...] = rows_m
        l[...] = rows_l
    return decay


def weights(scores: np.ndarray, lse: np.ndarray) -> None:
    """Turn `scores` into ``exp(scores - lse)``, in place. Hidden scores are -inf. Rows with lse = inf get zeros."""
    library = compiled()
    if library is None:
        np.subtract(scores, lse[..., None], out=scores)
        np.exp(scores, out=scores)
    else:
        lse = np.ascontiguousarray(lse)
        library.ringattn_weights(_address(scores), lse.size, scores.shape[-1], _address(lse))


def score_gradient(dweights: np.ndarray, weights: np.ndarray, delta: np.ndarray) -> None:
    """Turn `dweights`, the gradient with respect to the weights, into that with respect to the scores, in place."""
    library = compiled()
    if library is None:
        dweights -= delta[..., None]
        dweights *= weights
    else:
        delta = np.ascontiguousarray(delta)
        tiles = _address(dweights), _address(weights)
        library.ringattn_by_scores(*tiles, delta.size, weights.shape[-1], _address(delta))


@lru_cache(maxsize=8)
def _ones(n: int) -> np.ndarray:
    return np.ones(n, np.float32)


def _address(x: np.ndarray) -> int:
    return x.__array_interface__["data"][0]  # takes half the time of x.ctypes


@lru_cache(maxsize=1)
def compiled() -> ctypes.CDLL | None:
    """Load the library of ``softmax.c``; ``None`` where it was not compiled."""
    return load(Path(__file__).with_name("_softmax"), FUNCTIONS)
