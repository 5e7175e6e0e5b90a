"""Thread count of NumPy's OpenBLAS. It is one while a kernel runs its own threads."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np

_lock = threading.Lock()
_users = 0
_before = 1


def threads() -> int:
    """Return the thread count of a kernel: RINGATTN_THREADS, else OMP_NUM_THREADS, else the usable cores."""
    for name in ("RINGATTN_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > 0:
            return int(value)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def single_threaded() -> Iterator[None]:
    """Limit OpenBLAS to the calling thread. The last of several overlapping users restores the thread count."""
    global _users, _before
    library = _openblas()
    if library is None:
        yield
        return
    get, put = library
    with _lock:
        if _users == 0:
            _before = get()
            put(1)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                put(_before)


@lru_cache(maxsize=1)
def library_of_numpy() -> ctypes.CDLL | None:
    """Load the OpenBLAS of NumPy's wheel; ``None`` for another BLAS (Accelerate)."""
    package = Path(np.__file__).parent
    paths = [*package.parent.glob("numpy.libs/*openblas*"), *package.glob(".dylibs/*openblas*")]
    return ctypes.CDLL(str(paths[0])) if paths else None


@lru_cache(maxsize=1)
def _openblas() -> tuple | None:
    """Find the functions of OpenBLAS that get and set its thread count."""
    library = library_of_numpy()
    for prefix, suffix in (("scipy_", "64_"), ("scipy_", ""), ("", "64_"), ("", "")):
        name = f"{prefix}openblas_%s_num_threads{suffix}"
        if hasattr(library, name % "get"):
            return getattr(library, name % "get"), getattr(library, name % "set")
    return None
