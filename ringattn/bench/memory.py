"""Peak memory of this process."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path

import mlx.core as mx

from ..core.device import uses_gpu

_STATUS = Path("/proc/self/status")


class PeakMemory:
    """Peak memory of this process since the creation of this object.

    On a GPU it is that of MLX's arrays, else the resident memory.
    """

    def __init__(self) -> None:
        _release()
        self._on_gpu = uses_gpu()
        if self._on_gpu:
            mx.reset_peak_memory()
        elif _STATUS.exists():
            # Reset earlier peaks, such as that of loading a model; if that is not allowed, start from them.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
        self._before = mx.get_active_memory() if self._on_gpu else _peak()

    def highest(self) -> int:
        """Bytes at the peak."""
        return int(mx.get_peak_memory() if self._on_gpu else _peak())

    def growth(self) -> int:
        """Bytes by which the peak has grown."""
        return self.highest() - self._before


def _release() -> None:
    """Give free memory back to the system: growth into memory that MLX or the C library holds could not be seen."""
    mx.clear_cache()
    with contextlib.suppress(AttributeError, OSError):  # glibc has it, and other libraries hold less
        ctypes.CDLL(None).malloc_trim(0)


def _peak() -> int:
    """Peak resident memory in bytes."""
    if _STATUS.exists():  # getrusage may give the parent's peak, which a child inherits on Linux
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
