"""Comparison of the number of processes that the launcher started with the number that the MPI library sees.

Under the mpiexec of another MPI every process would be a ring of its own, and compute a wrong answer without an error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...errors import RingError
from ..environment import SLURM_TASKS, read_count

_RANKS = ("PMIX_RANK", "PALS_RANKID")  # from launchers that may give a rank without a size


@dataclass(frozen=True)
class _Launcher:
    """A launcher that sets the number of processes in their environment.

    Attributes:
        variable: The number of processes.
        name: Its name in messages.
        mpi: The MPI that it belongs to; ``None``: it can serve any.
        mark: A variable that this launcher alone sets, so that a library of another MPI cannot talk to it.
    """

    variable: str
    name: str
    mpi: str | None = None
    mark: str = ""


_SLURM = _Launcher(SLURM_TASKS, "Slurm's srun")
_LAUNCHERS = (
    # PMI_SIZE also comes from Cray's PALS, Flux, and Slurm with --mpi=pmi2: these serve other MPIs, too.
    _Launcher("PMI_SIZE", "a PMI launcher, such as MPICH's mpiexec,", "MPICH", mark="MPI_LOCALNRANKS"),
    _Launcher("OMPI_COMM_WORLD_SIZE", "Open MPI's mpiexec", "Open MPI", mark="OMPI_COMM_WORLD_SIZE"),
)


def refuse_other_mpi(library: str, version: str, environment: Mapping[str, str] | None = None) -> None:
    """Raise `RingError` if the launcher belongs to an MPI that this library cannot talk to. MPI need not have started.

    Args:
        library: The vendor of the MPI library, such as ``"MPICH"``.
        version: The library's own description, which for MPICH includes how it was configured.
        environment: Default: this process's.
    """
    given = os.environ if environment is None else environment
    started = _started(given)
    known = [one.mpi for one in _LAUNCHERS]
    if library not in known or any(launcher.mpi == library for launcher, _ in started):
        return
    if "pmix" in version.lower():
        return  # an MPICH that was built for Open MPI's launcher
    for launcher, count in started:
        if count > 1 and launcher.mark in given:
            raise RingError(_message(launcher, count, library, "which cannot join them"))


def refuse_other_size(library: str, size: int, environment: Mapping[str, str] | None = None) -> None:
    """Raise `RingError` unless the library sees as many processes as the launcher has started.

    Args:
        library: The vendor of the MPI library.
        size: The number of processes that it sees.
        environment: Default: this process's.
    """
    given = os.environ if environment is None else environment
    started = _started(given)
    if any(count == size or (launcher is _SLURM and count < size) for launcher, count in started):
        return  # a step of Slurm may be one of several that make a job
    for launcher, count in started:
        raise RingError(_message(launcher, count, library, f"which sees {size}"))
    for variable in _RANKS:
        if (rank := read_count(given, variable)) is not None and rank >= size:
            what = f"the launcher made this process rank {rank} ({variable}), but mpi4py loads {library}'s library"
            raise RingError(f"backend 'mpi': {what}, which sees {size}; start with the mpiexec of {library}")


def _started(environment: Mapping[str, str]) -> Sequence[tuple[_Launcher, int]]:
    """The launchers that set a number of processes, with that number. Slurm counts only where no other has."""
    for launchers in (_LAUNCHERS, (_SLURM,)):
        found = [(one, count) for one in launchers if (count := read_count(environment, one.variable)) is not None]
        if found:
            return found
    return []


def _message(launcher: _Launcher, count: int, library: str, loaded: str) -> str:
    remedy = f"start with the mpiexec of {library}, or install {launcher.mpi} in its place"
    if launcher.mpi is None:
        remedy = f"start with the mpiexec of {library}, or with the srun --mpi=... that it was built for (pmi2, pmix)"
    elif launcher.mpi == library:
        remedy = "start with the mpiexec that belongs to this very library"
    return (
        f"backend 'mpi': {launcher.name} started {count} processes ({launcher.variable}={count}), but mpi4py loads "
        f"{library}'s library, {loaded}, so that each would be a ring of its own; {remedy}"
    )
