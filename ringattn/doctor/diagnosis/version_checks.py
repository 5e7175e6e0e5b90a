"""Checks that all ranks have the same software."""

from __future__ import annotations

from collections.abc import Iterator

from .examination import Examination, Finding, differences
from .start_checks import INSTALL, versions_agree

MUST_AGREE = {  # -> remedy
    "python": "put the virtual environment at the same path on all hosts",
    "ringattn": "install the same version on all hosts",
    "mlx": "install the same mlx on all hosts: pip install mlx==VERSION",
    "mpi4py": "install the same mpi4py on all hosts: pip install mpi4py==VERSION",
}
SHOULD_AGREE = {  # -> remedy
    "python_version": "use the same Python everywhere",
    "numpy": "install the same numpy on all hosts",
}


def _versions(exam: Examination) -> Iterator[Finding]:
    """Different versions and paths."""
    hosts = {number: rank.host for number, rank in exam.reports.ranks.items() if rank.host}
    for fatal, names in ((True, MUST_AGREE), (False, SHOULD_AGREE)):
        for name, remedy in names.items():
            values = {number: str(getattr(host, name)) for number, host in hosts.items()}
            yield from differences(exam, fatal, name.replace("_", " "), values, remedy)


def _mpi_libraries(exam: Examination) -> Iterator[Finding]:
    """Different MPI libraries."""
    flavours = {number: rank.mpi.flavour for number, rank in exam.reports.ranks.items() if rank.mpi}
    yield from differences(exam, True, "MPI", flavours, f"install the same MPI on all hosts: {INSTALL}")


def _sources(exam: Examination) -> Iterator[Finding]:
    """Different sources of one version of ringattn."""
    if versions_agree(exam):
        codes = {number: rank.host.code for number, rank in exam.reports.ranks.items() if rank.host}
        remedy = "bring all checkouts to the same commit"
        yield from differences(exam, True, "the source of ringattn", codes, remedy)


CHECKS = (_versions, _mpi_libraries, _sources)
