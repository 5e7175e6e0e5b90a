"""Rings of ranks and the transports that carry them."""

from __future__ import annotations

import math
import os
from typing import Any

from ..checks import told
from ..errors import ArgumentError, ArgumentTypeError
from .base import Event, Gate, Ring, Transfer
from .environment import launched_by
from .status import status

__all__ = ["Event", "Gate", "Ring", "Transfer", "init", "launched_by"]

_BACKENDS = ("mpi", "mlx", "solo")


def init(backend: str | None = None, *, comm: Any = None, timeout: float | None = None) -> Ring:
    """Join the ring of all processes of this job. Collective: every rank calls it.

    Args:
        backend: ``"mpi"`` under mpiexec, ``"mlx"`` under mlx.launch (its backends ``ring`` and ``jaccl``), or
            ``"solo"`` for a ring of one; ``None`` for what the launcher's environment says, and ``"solo"`` where there
            is no launcher. Over ``"mlx"`` there is no `split`.
        comm: An mpi4py intracommunicator whose ranks make the ring, instead of all processes.
        timeout: Seconds without a sign of life after which a rank counts as dead. A long computation is not a
            stall. Default: the environment variable ``RINGATTN_TIMEOUT``, else 60.

    Returns:
        The ring, a context manager.

    Raises:
        ArgumentError: If an argument is wrong.
        RingError: If the backend cannot be used here; the message says what to do about it.
    """
    backend = _choose(backend, comm)
    if backend == "solo":
        from .solo import SoloRing

        return SoloRing(read_timeout(timeout))
    with status.opening():
        if backend == "mlx":
            from . import mlx

            return mlx.open_ring(timeout)
        from . import mpi

        return mpi.open_ring(comm, timeout)


def _choose(backend: str | None, comm: Any) -> str:
    if backend is None:
        if comm is not None:
            return "mpi"
        backend = launched_by()
    if not isinstance(backend, str) or backend not in _BACKENDS:
        raise ArgumentError(f"backend: {told(backend)}, expected one of {', '.join(map(repr, _BACKENDS))}, or None")
    if comm is not None and backend != "mpi":
        raise ArgumentError(f"comm: given with backend {backend!r}, expected backend 'mpi' with it")
    return backend


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
        raise ArgumentTypeError(f"{name}: {told(value)}, expected a number of seconds")
    if not (math.isfinite(value) and value > 0):
        raise ArgumentError(f"{name}: {value}, expected a positive, finite number of seconds")
    return float(value)
