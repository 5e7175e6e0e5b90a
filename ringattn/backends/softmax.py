"""One step of the online softmax over a tile of scores: compiled where the installation could, else NumPy.

NumPy takes four passes over a tile, and without AVX-512 its exp alone costs as much as a third of both matrix products;
``softmax.c`` needs one pass. It is built by ``pip install`` if there is a C compiler, and nothing needs it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np

Step = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def step(scores: np.ndarray, m: np.ndarray, l: np.ndarray) -> np.ndarray:
    """Turn `scores` into weights relative to the new maximum and update `m` and `l`, all in place.

    Args:
        scores: float32 ``[..., rows, keys]``, contiguous; hidden ones are -inf.
        m: Running maximum of each row, float32 ``[..., rows]``.
        l: Running sum of each row.

    Returns:
        ``exp(m before - m after)``, what the rows' accumulators have to be multiplied with.
    """
    return (compiled() or in_numpy)(scores, m, l)


def in_numpy(scores: np.ndarray, m: np.ndarray, l: np.ndarray) -> np.ndarray:
    """`step` in NumPy."""
    top = np.maximum(m, scores.max(axis=-1))
    base = np.where(top == -np.inf, np.float32(0), top)  # a row that has seen nothing yet
    np.subtract(scores, base[..., None], out=scores)
    np.exp(scores, out=scores)
    decay = np.exp(m - base)
    l *= decay
    l += scores @ _ones(scores.shape[-1])
    m[...] = top
    return decay


@lru_cache(maxsize=8)
def _ones(n: int) -> np.ndarray:
    return np.ones(n, np.float32)


def _address(x: np.ndarray) -> int:
    return x.__array_interface__["data"][0]  # half the time that x.ctypes takes


@lru_cache(maxsize=1)
def compiled() -> Step | None:
    """`step` in C; ``None`` where it was not built."""
    paths = [Path(__file__).with_name(f"_softmax{suffix}") for suffix in EXTENSION_SUFFIXES]
    found = next((path for path in paths if path.exists()), None)
    if found is None:
        return None
    try:
        function = ctypes.CDLL(str(found)).ringattn_softmax_step
    except (OSError, AttributeError):  # built for another machine, or by another version
        return None
    pointer = ctypes.c_void_p
    function.argtypes = [pointer, ctypes.c_int64, ctypes.c_int64, pointer, pointer, pointer]
    function.restype = None

    def in_c(scores: np.ndarray, m: np.ndarray, l: np.ndarray) -> np.ndarray:
        rows_m, rows_l = np.ascontiguousarray(m), np.ascontiguousarray(l)
        decay = np.empty(m.shape, np.float32)
        function(_address(scores), m.size, scores.shape[-1], _address(rows_m), _address(rows_l), _address(decay))
        if rows_m is not m:  # strided rows: these were copies
            m[...], l[...] = rows_m, rows_l
        return decay

    return in_c
