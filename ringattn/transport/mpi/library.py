"""The MPI library of this process. Asking for it starts MPI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import RingError

LEVELS = ("single", "funneled", "serialized", "multiple")


@dataclass(frozen=True)
class Library:
    """The MPI that a process runs with.

    Attributes:
        version: In its own words.
        flavour: ``"MPICH"``, ``"Open MPI"`` or another.
        threads: The level of support, of `LEVELS`; rings need ``"multiple"``.
        size: Processes of the job.
    """

    version: str
    flavour: str
    threads: str
    size: int


def load_mpi() -> Any:
    """mpi4py's ``MPI``.

    Raises:
        RingError: mpi4py is missing, or it found no MPI library.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        why = str(error).partition("\n")[0]
        raise RingError(f"backend 'mpi' needs mpi4py and MPI ({why}): pip install 'ringattn[mpi]'") from error
    return MPI


def library() -> Library:
    """What MPI this process runs with; `RingError` where there is none."""
    MPI = load_mpi()
    known = {getattr(MPI, f"THREAD_{name.upper()}"): name for name in LEVELS}
    version = " ".join(MPI.Get_library_version().partition("\n")[0].split())
    return Library(version.rstrip("\0"), MPI.get_vendor()[0], known[MPI.Query_thread()], MPI.COMM_WORLD.Get_size())
