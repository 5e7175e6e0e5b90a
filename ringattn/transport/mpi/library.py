"""The MPI library of this process. Loading it starts MPI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import RingError
from .launchers import refuse_other_mpi, refuse_other_size

LEVELS = ("single", "funneled", "serialized", "multiple")


@dataclass(frozen=True)
class Library:
    """The MPI that a process runs with.

    Attributes:
        version: The library's own description.
        flavour: ``"MPICH"``, ``"Open MPI"`` or another.
        threads: The level of support, of `LEVELS`; rings need ``"multiple"``.
        size: Processes of the job.
    """

    version: str
    flavour: str
    threads: str
    size: int


def load_mpi() -> Any:
    """Return mpi4py's ``MPI``, started.

    Raises:
        RingError: mpi4py is missing, it found no MPI library, or the launcher belongs to another MPI.
    """
    try:
        MPI = _import()
    except (ImportError, RuntimeError) as error:
        why = str(error).partition("\n")[0]
        raise RingError(f"backend 'mpi' needs mpi4py and MPI ({why}): pip install 'ringattn[mpi]'") from error
    vendor = MPI.get_vendor()[0]
    if not MPI.Is_initialized():
        refuse_other_mpi(vendor, MPI.Get_library_version())
        _start(MPI)
    refuse_other_size(vendor, MPI.COMM_WORLD.Get_size())
    return MPI


def _import() -> Any:
    """Import mpi4py's ``MPI`` without starting it: a library may end the process if its launcher is another MPI's."""
    import mpi4py

    initialize = mpi4py.rc.initialize
    finalize = mpi4py.rc.finalize
    mpi4py.rc.initialize = False
    if mpi4py.rc.finalize is None:
        mpi4py.rc.finalize = True
    try:
        from mpi4py import MPI
    finally:
        mpi4py.rc.initialize = initialize
        mpi4py.rc.finalize = finalize
    return MPI


def _start(MPI: Any) -> None:
    """Start MPI with the threads that mpi4py would ask for, had it started MPI itself."""
    from mpi4py import rc

    level = rc.thread_level if rc.threads else "single"
    MPI.Init_thread(getattr(MPI, f"THREAD_{level.upper()}"))


def library() -> Library:
    """Describe the MPI that this process runs with; `RingError` where there is none."""
    MPI = load_mpi()
    known = {getattr(MPI, f"THREAD_{name.upper()}"): name for name in LEVELS}
    version = " ".join(MPI.Get_library_version().partition("\n")[0].split())
    return Library(version.rstrip("\0"), MPI.get_vendor()[0], known[MPI.Query_thread()], MPI.COMM_WORLD.Get_size())
