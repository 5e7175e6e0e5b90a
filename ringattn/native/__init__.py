"""Native code: the small C libraries that ``pip install`` builds where there is a compiler, and NumPy's BLAS.

Importing these modules does not import MLX.
"""

from __future__ import annotations

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path


def load(stem: Path, functions: dict[str, list]) -> ctypes.CDLL | None:
    """The library at `stem` plus the platform's suffix, with the argument types of its functions.

    ``None`` where it was not built, or for another machine, or by another version.
    """
    for suffix in EXTENSION_SUFFIXES:
        path = stem.with_name(stem.name + suffix)
        if path.exists():
            try:
                library = ctypes.CDLL(str(path))
                for function, types in functions.items():
                    getattr(library, function).argtypes, getattr(library, function).restype = types, None
            except (OSError, AttributeError):
                return None
            return library
    return None
