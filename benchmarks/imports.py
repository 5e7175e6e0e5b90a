"""Time of ``import ringattn`` beyond the import of mlx and numpy."""

from __future__ import annotations

import subprocess
import sys
from statistics import median

from .common import show


def main() -> None:
    """Time the import in new processes."""
    code = "import time, mlx.core, numpy; t = time.perf_counter(); import ringattn, sys; print(time.perf_counter() - t)"
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) for _ in range(9)
    ]
    show("import ringattn, beyond mlx and numpy (aim: under 0.3 s)", ["median s"], [[f"{median(seconds):.3f}"]])


if __name__ == "__main__":
    main()
