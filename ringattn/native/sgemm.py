"""Redirection of MLX's float32 matrix products on Linux to NumPy's BLAS, which is about twenty times faster.

MLX's library gets NumPy's function in place of its own. Importing `ringattn` installs it, before or after MLX.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache
from pathlib import Path

from . import load
from .blas import library_of_numpy

SWITCH = "RINGATTN_BLAS"  # "mlx" keeps MLX's own BLAS
LIBRARY = Path(__file__).with_name("_sgemm")
FUNCTIONS = {"ringattn_redirect": [ctypes.c_void_p], "ringattn_sgemm_calls": []}
REMEDY = (
    "MLX's own BLAS on Linux is slow, and NumPy's does not replace it here: install ringattn where there is a C "
    "compiler, and NumPy from PyPI; or preload an OpenBLAS (LD_PRELOAD=.../libopenblas.so.0)"
)


@lru_cache(maxsize=1)
def install() -> bool:
    """Redirect the products of the loaded MLX to NumPy's BLAS, unless the user has chosen another. Return success."""
    if not sys.platform.startswith("linux") or chosen():
        return False
    numpys = library_of_numpy()
    library = load(LIBRARY, FUNCTIONS)
    if library is None or numpys is None or not hasattr(numpys, "scipy_cblas_sgemm64_"):
        return False
    library.ringattn_redirect.restype = ctypes.c_int
    return bool(library.ringattn_redirect(ctypes.cast(numpys.scipy_cblas_sgemm64_, ctypes.c_void_p)))


def chosen() -> list[str]:
    """List the environment variables by which the user has chosen another BLAS."""
    switched = [SWITCH] if os.environ.get(SWITCH) == "mlx" else []
    return switched + (["LD_PRELOAD"] if "blas" in os.environ.get("LD_PRELOAD", "").lower() else [])


def advice() -> str | None:
    """Return advice where MLX's products are slow, else ``None``. A BLAS that the user chose needs none."""
    return None if not sys.platform.startswith("linux") or chosen() or install() else REMEDY


def calls() -> int:
    """Count the products that this process has redirected."""
    library = load(LIBRARY, FUNCTIONS)
    if library is None:
        return 0
    library.ringattn_sgemm_calls.restype = ctypes.c_int64
    return int(library.ringattn_sgemm_calls())
