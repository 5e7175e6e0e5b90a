"""Peak memory of this process."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


class PeakMemory:
    """Growth of this process's peak resident memory since the creation of this object."""

    def __init__(self) -> None:
        if _STATUS.exists():
            # Reset earlier peaks, such as that of loading the model; if that is not allowed, start from them.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
        self._before = _peak()

    def growth(self) -> int:
        """Bytes by which the peak has grown."""
        return _peak() - self._before

    def highest(self) -> int:
        """Peak resident memory since then, in bytes."""
        return _peak()


def _peak() -> int:
    """Peak resident memory in bytes."""
    if _STATUS.exists():  # getrusage may give the parent's peak, which a child inherits on Linux
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
