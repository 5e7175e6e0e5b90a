"""MLX's float32 matrix products on Linux, about twenty times faster: done by the BLAS inside NumPy.

MLX's library gets NumPy's function in the place of its own, whenever it was loaded; `ringattn` does it when imported.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache
from pathlib import Path

from . import load
from .blas import library_of_numpy

SWITCH = "RINGATTN_BLAS"  # "mlx": leave MLX its own
LIBRARY = Path(__file__).with_name("_sgemm")
FUNCTIONS = {"ringattn_redirect": [ctypes.c_void_p], "ringattn_sgemm_calls": []}
REMEDY = (
    "MLX's own BLAS on Linux is slow, and NumPy's is not in its place: install ringattn where there is a C compiler, "
    "and NumPy from PyPI; or preload an OpenBLAS (LD_PRELOAD=.../libopenblas.so.0)"
)


@lru_cache(maxsize=1)
def install() -> bool:
    """Have MLX, which is loaded, multiply with NumPy's BLAS, unless the user has chosen another; whether it will."""
    if not sys.platform.startswith("linux") or chosen():
        return False
    numpys, library = library_of_numpy(), load(LIBRARY, FUNCTIONS)
    if library is None or numpys is None or not hasattr(numpys, "scipy_cblas_sgemm64_"):
        return False
    library.ringattn_redirect.restype = ctypes.c_int
    return bool(library.ringattn_redirect(ctypes.cast(numpys.scipy_cblas_sgemm64_, ctypes.c_void_p)))


def chosen() -> list[str]:
    """The variables with which the user has chosen another BLAS than NumPy's."""
    switched = [SWITCH] if os.environ.get(SWITCH) == "mlx" else []
    return switched + (["LD_PRELOAD"] if "blas" in os.environ.get("LD_PRELOAD", "").lower() else [])


def advice() -> str | None:
    """What to do where MLX's products are slow; ``None`` where they are not, or where that was chosen."""
    return None if not sys.platform.startswith("linux") or chosen() or install() else REMEDY


def calls() -> int:
    """How many products of this process went that way."""
    library = load(LIBRARY, FUNCTIONS)
    if library is None:
        return 0
    library.ringattn_sgemm_calls.restype = ctypes.c_int64
    return int(library.ringattn_sgemm_calls())
