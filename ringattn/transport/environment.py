"""Settings of a job in the environment: the launcher's and the user's."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from ..core.validation import format_value
from ..errors import ArgumentError, ArgumentTypeError

_MPI_LAUNCHERS = ("PMI_RANK", "PMI_SIZE", "PMIX_RANK", "OMPI_COMM_WORLD_SIZE")  # set by Hydra, PMIx and Open MPI
_MLX_LAUNCHERS = ("MLX_RANK", "MLX_WORLD_SIZE")
SLURM_TASKS = "SLURM_STEP_NUM_TASKS"  # how many processes srun started


def launched_by() -> str:
    """The backend for the launcher that started this process; ``"solo"`` without one."""
    if any(name in os.environ for name in _MPI_LAUNCHERS):
        return "mpi"
    if any(name in os.environ for name in _MLX_LAUNCHERS):
        return "mlx"
    return "mpi" if (read_count(os.environ, SLURM_TASKS) or 1) > 1 else "solo"


def read_count(environment: Mapping[str, str], name: str) -> int | None:
    """The number that a launcher has set in `name`, or ``None``."""
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else None


def read_timeout(timeout: float | None) -> float:
    """`timeout` in seconds, from the environment where it is ``None``."""
    name = "timeout"
    value: Any = timeout
    if timeout is None:
        name, value = "RINGATTN_TIMEOUT", os.environ.get("RINGATTN_TIMEOUT") or "60"
        try:
            value = float(value)
        except ValueError:
            raise ArgumentError(f"{name}: {value!r}, expected a number of seconds") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentTypeError(f"{name}: {format_value(value)}, expected a number of seconds")
    if not (math.isfinite(value) and value > 0):
        raise ArgumentError(f"{name}: {value}, expected a positive, finite number of seconds")
    return float(value)
