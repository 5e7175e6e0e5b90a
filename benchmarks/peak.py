"""Peak memory of this process."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


class PeakMemory:
    """How far this process's peak resident memory grows after this object was made."""

    def __init__(self) -> None:
        if _STATUS.exists():
            # Forget earlier peaks, such as that of loading the model; where that is not allowed, start from them.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
        self._before = _peak()

    def growth(self) -> int:
        """Bytes by which the peak has grown."""
        return _peak() - self._before


def _peak() -> int:
    """Peak resident memory in bytes."""
    if _STATUS.exists():  # getrusage would give the parent's peak where that is larger: Linux hands it on
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
