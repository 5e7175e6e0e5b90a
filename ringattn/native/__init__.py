"""Native code: C libraries that ``pip install`` compiles where there is a compiler, and NumPy's BLAS.

Importing these modules does not import MLX.
"""

from __future__ import annotations

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path


def load(stem: Path, functions: dict[str, list]) -> ctypes.CDLL | None:
    """Load the library at `stem` plus the platform's suffix, and set the argument types of its functions.

    Return ``None`` where the library is missing, or was compiled for another machine or by another version.
    """
    for suffix in EXTENSION_SUFFIXES:
        path = stem.with_name(stem.name + suffix)
        if path.exists():
            try:
                library = ctypes.CDLL(str(path))
                for function, types in functions.items():
                    getattr(library, function).argtypes = types
                    getattr(library, function).restype = None
            except (OSError, AttributeError):
                return None
            return library
    return None
