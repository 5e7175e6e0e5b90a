"""Rings of ranks and the transports that carry them."""

from __future__ import annotations

import sys
from typing import Any

from ..core.validation import format_value
from ..errors import ArgumentError, RingError
from .base import Event, Ring
from .environment import launched_by, read_timeout
from .failures.status_file import status
from .interface import Signal, Transfer
from .trace_file import traced

__all__ = ["Event", "Signal", "Ring", "Transfer", "init"]

_BACKENDS = ("mpi", "mlx", "solo")


def init(backend: str | None = None, *, comm: Any = None, timeout: float | None = None) -> Ring:
    """Join the ring of all processes of this job. Collective: every rank calls it.

    Args:
        backend: ``"mpi"`` under mpiexec, ``"mlx"`` under mlx.launch (its backends ``ring`` and ``jaccl``), or
            ``"solo"`` for a ring of one. ``None`` chooses by the launcher's environment, ``"solo"`` without a
            launcher. Over ``"mlx"`` there is no `split`. Over ``"mpi"``, the blocks of `ring_attention` travel by NCCL
            where every rank's default device is an NVIDIA GPU of its own, unless ``RINGATTN_NCCL`` is 0.
        comm: An mpi4py intracommunicator whose ranks make the ring, instead of all processes.
        timeout: Seconds without a heartbeat after which a rank counts as dead. A long computation is not a stall: a
            thread of its own sends the heartbeats. It sends none while one call keeps Python's global interpreter lock
            (a regular expression, arithmetic of very large integers, ``json.loads`` of a large text). Under
            ``ringattn launch`` such a rank counts as alive as long as it computes, if `timeout` is at least 2.
            Under ``mpiexec`` and ``mlx.launch`` alone, choose a timeout longer than the longest such call. Default:
            the environment variable ``RINGATTN_TIMEOUT``, else 60.

    Returns:
        The ring, a context manager.

    Raises:
        ArgumentError: If an argument is wrong.
        RingError: If the backend cannot be used here; the message says what to do about it.
    """
    backend = _choose(backend, comm)
    if backend == "solo":
        from .solo import SoloRing

        return traced(SoloRing(read_timeout(timeout)))
    with status.opening():
        ring = _open_mlx_ring(timeout) if backend == "mlx" else _open_mpi_ring(comm, timeout)
    return traced(ring)


def _open_mlx_ring(timeout: float | None) -> Ring:
    from .mlx.backend import launched_size
    from .mlx.ring import open_ring

    MPI = sys.modules.get("mpi4py.MPI")
    if launched_size() > 1 and MPI is not None and MPI.Is_initialized():
        raise RingError("backend 'mlx': this process has started MPI, and only one of the two can be; use 'mpi'")
    return open_ring(timeout)


def _open_mpi_ring(comm: Any, timeout: float | None) -> Ring:
    from .mlx.process import is_open
    from .mpi.ring import open_ring

    if is_open():
        raise RingError("backend 'mpi': this process is connected by mx.distributed, and only one of the two can be")
    return open_ring(comm, timeout)


def _choose(backend: str | None, comm: Any) -> str:
    if backend is None:
        if comm is not None:
            return "mpi"
        backend = launched_by()
    if not isinstance(backend, str) or backend not in _BACKENDS:
        raise ArgumentError(
            f"backend: {format_value(backend)}, expected one of {', '.join(map(repr, _BACKENDS))}, or None"
        )
    if comm is not None and backend != "mpi":
        raise ArgumentError(f"comm: given with backend {backend!r}, expected backend 'mpi' with it")
    return backend
