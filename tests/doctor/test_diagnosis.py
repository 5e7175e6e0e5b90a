"""Tests of the diagnosis: every finding, whether it is fatal, and whom it names."""

from __future__ import annotations

from dataclasses import replace

import pytest
from doctor_cases import FAST, LINUX, MAC, MPICH, about, found, healthy

import ringattn
from ringattn.doctor import link_speed
from ringattn.doctor.breakeven import break_even
from ringattn.doctor.compute_speed import ComputeSpeeds
from ringattn.doctor.connectivity import FailedConnection
from ringattn.doctor.diagnosis import diagnose
from ringattn.doctor.diagnosis.examination import Examination
from ringattn.doctor.output import as_json, as_text
from ringattn.doctor.records import Library, RankReports
from ringattn.doctor.row_speed import RowSpeed
from ringattn.errors import RingError
from ringattn.launcher.hostfile import Host
from ringattn.launcher.preflight import Trouble
from ringattn.transport.handshake import introduce


def test_healthy():
    for size in (1, 2, 3, 8):
        assert found(healthy(size)) == []


# What will not work


@pytest.mark.parametrize(
    ("change", "named", "usual", "other"),
    [
        ({"python": "/other/python"}, "python", "/venv/bin/python", "/other/python"),
        ({"ringattn": "0.2.0", "code": "x"}, "ringattn", "0.1.0", "0.2.0"),
        ({"code": "def"}, "the source of ringattn", "abc", "def"),
        ({"mlx": "0.31.0"}, "mlx", "0.32.4", "0.31.0"),
        ({"mpi4py": "not installed"}, "mpi4py", "4.1.2", "not installed"),
    ],
)
def test_difference_is_fatal(change, named, usual, other):
    exam = healthy()
    about(exam, 1, **change)
    [line] = found(exam)
    report = f"error: {named}: differs: {usual} on ranks 0, 2 (mac0, mac2), {other} on rank 1 (mac1); "
    assert line.startswith(report) and len(line.partition("; ")[2]) > 10


def test_hosts_between_which_nothing_passes():
    """Each pair is reported once, whichever ranks tried. Ranks that end for this reason are not reported."""
    exam = healthy(4)
    about(exam, 3, host="mac2")
    exam.reports.failed_connections = [
        FailedConnection(1, 2, "timed out"),
        FailedConnection(1, 3, "timed out"),
        FailedConnection(2, 1, "no route"),
        FailedConnection(0, 1, "refused"),
    ]
    exam.exit_status = 1
    for rank in exam.reports.ranks.values():
        rank.done = False
        rank.doing = "connecting to all other hosts"
    first, second = found(exam)
    ends = "from mac1 to mac2 (timed out) and from mac2 to mac1 (no route)"
    assert first.startswith(f"error: mac1 and mac2: no TCP connection {ends}, and MPI needs one")
    assert first.endswith("and at their firewalls")
    assert second.startswith("error: mac0 and mac1: no TCP connection from mac0 to mac1 (refused), and MPI needs one")


def test_two_mpis():
    exam = healthy()
    exam.reports.ranks[2].mpi = Library("Open MPI v5.0.11", "Open MPI", "multiple", 3)
    [line] = found(exam)
    assert line.startswith(
        "error: MPI: differs: MPICH on ranks 0, 1 (mac0, mac1), Open MPI on rank 2 (mac2); install the same MPI"
    )


def test_thread_level():
    exam = healthy()
    exam.reports.ranks[1].mpi = replace(MPICH, threads="serialized")
    [line] = found(exam)
    assert line.startswith("error: rank 1 (mac1): MPI gives thread level 'serialized'") and "pip install" in line


def test_ranks_that_see_themselves_alone():
    exam = healthy(2)
    for rank in exam.reports.ranks.values():
        rank.mpi = replace(MPICH, size=1)
    assert all("sees 1 of 2 ranks" in line and "--mpiexec" in line for line in found(exam)) and len(found(exam)) == 2
    exam.mpi_mismatch = "mpiexec belongs to MPICH, but mpi4py loads Open MPI; keep one of them"
    assert found(exam) == ["error: MPI: mpiexec belongs to MPICH, but mpi4py loads Open MPI; keep one of them"]


def test_rank_that_does_not_start():
    exam = healthy()
    del exam.reports.ranks[1]
    exam.exit_status = 255
    exam.launcher_message = "ssh: connect to host mac1 port 22: Connection refused"
    [line] = found(exam)
    assert line.startswith("error: rank 1 (mac1): did not start (ssh: connect to host mac1 port 22: ")
    assert line.endswith("see whether `ssh mac1 true` works without a password, and ringattn is installed there")
    del exam.reports.ranks[2]
    assert [line.partition(": did")[0] for line in found(exam)] == ["error: ranks 1, 2 (mac1, mac2)"]
    exam.reports.ranks.clear()
    [line] = found(exam)
    assert line.startswith("error: launch: no rank started (ssh: ") and "`ssh mac1 true`" in line
    exam.launcher_message = "ssh: connect to host mac10 port 22"
    assert "`ssh mac0 / mac1 / mac2 true`" in found(exam)[0]


def test_hosts_that_are_left_out():
    """The other hosts are reported in full. Each remedy names its own host."""
    exam = healthy()
    exam.troubles = (Trouble(Host("me@mac3"), "Connection refused", "start its sshd"), Trouble(Host("mac4"), "a", "b"))
    assert found(exam) == ["error: host me@mac3: Connection refused; start its sshd", "error: host mac4: a; b"]
    nothing = Examination(0, RankReports(), troubles=exam.troubles)
    assert as_text(nothing, diagnose(nothing), "float16").splitlines() == found(exam)
    assert as_json(nothing, diagnose(nothing), "float16")["ok"] is False


def test_ranks_with_different_versions_of_ringattn():
    """The ring's error has a remedy of its own. If the hosts' versions differ too, only one of both is reported."""
    with pytest.raises(RingError) as error:
        introduce(None, lambda mine: [mine, ["0.0.1", *mine[1:]]])
    exam = healthy(2)
    exam.exit_status = 1
    for rank in exam.reports.ranks.values():
        rank.done = False
        rank.doing = "opening the ring"
        rank.problem = str(error.value)
    [line] = found(exam)
    report = (
        f"error: ringattn: differs: {ringattn.__version__} on rank 0, 0.0.1 on rank 1; install the same version on all"
    )
    assert line == report
    about(exam, 1, ringattn="0.0.1")
    [line] = found(exam)
    assert line.startswith(
        "error: ringattn: differs: 0.1.0 on rank 0 (mac0), 0.0.1 on rank 1 (mac1); install the same v"
    )


def test_rank_that_fails():
    exam = healthy()
    exam.exit_status = 1
    for number in (0, 2):
        rank = exam.reports.ranks[number]
        rank.done = False
        rank.doing = "measuring link 0-1"
        rank.problem = "link 0-1: mac1 gave no sign of life"
    exam.reports.ranks[1].done = False
    exam.launcher_message = "rank 1 (mac1) was killed by SIGKILL"
    first, second = found(exam)
    assert first.startswith("error: rank 0 (mac0): link 0-1: mac1 gave no sign of life; look at that link")
    assert second.startswith("error: rank 1 (mac1): ended while measuring a hop (rank 1 (mac1) was killed by SIGKILL)")


def test_rank_that_never_ends():
    exam = healthy()
    exam.exit_status = None
    exam.time_limit = 60
    exam.reports.ranks[2].done = False
    exam.reports.ranks[2].doing = "opening the ring"
    [line] = found(exam)
    assert line.startswith("error: launch: not finished after 60 s (rank 2 (mac2) was opening the ring); look at that ")


def test_no_mpi():
    exam = healthy(1)
    exam.launch_problem = "no mpiexec found, beside this Python or on PATH: pip install 'ringattn[mpi]'"
    [line] = found(exam)
    assert line.startswith("error: MPI: no mpiexec found, beside this Python or on PATH; pip install 'ringattn[mpi]'")


# What costs speed


def test_numpy_and_python_may_differ():
    exam = healthy()
    about(exam, 0, numpy="1.26.0", python_version="3.10.1")
    assert [line.partition(" differs")[0] for line in found(exam)] == ["warning: python version:", "warning: numpy:"]


def test_slow_blas_on_linux():
    exam = healthy(2)
    for rank in exam.reports.ranks.values():
        rank.host = LINUX
        rank.speeds = replace(FAST, mlx=5e9, numpy=1e11, attention=17e12)
    [line] = found(exam)  # once for both ranks of this host
    report = "warning: rank 0 (mac): MLX multiplies float32 at 5 GFLOP/s, NumPy at 100; "
    assert line.startswith(f"{report}see what else runs there") and "unset" not in line
    about(exam, 0, blas_advice="preload an OpenBLAS")
    assert found(exam) == [f"{report}preload an OpenBLAS"]
    for rank in exam.reports.ranks.values():
        rank.speeds = replace(FAST, mlx=9e10, numpy=1e11)
    assert found(exam) == []


def test_products_in_tf32():
    exam = healthy()
    about(exam, 1, float32="TF32")
    [line] = found(exam)
    assert line.startswith("warning: rank 1 (") and line.endswith("less exact; set MLX_ENABLE_TF32=0 there")
    assert "TF32" in as_text(exam, [], "float16")


@pytest.mark.parametrize(
    ("load", "spread", "signs"),
    [
        (7.9, 1.0, "load average 7.9 a core before the doctor began"),
        (0.1, 12.34, "equal measurements differ 12.3-fold"),
        (0.6, 3.0, "load average 0.6 a core before the doctor began, equal measurements differ 3.0-fold"),
    ],
)
def test_a_busy_host(load, spread, signs):
    """A busy host measures very low speeds: it is named, and no speed is shown as 0."""
    exam = healthy()
    about(exam, 1, load=load)
    exam.reports.ranks[1].speeds = ComputeSpeeds(2e8, 1.5e8, 3e8, 3e8, 9e6, spread)
    [line] = [line for line in found(exam) if line.startswith("warning: rank")]
    assert line == (
        f"warning: rank 1 (mac1): busy: {signs}; its speeds here are too low: end what else runs there (see top), "
        "and run the doctor again"
    )
    shown = as_text(exam, diagnose(exam), "float16")
    assert ["1", "0.2", "0.15", "0.3", "0.3", "0.009"] in [row.split() for row in shown.splitlines()]
    assert "nothing is wrong" not in shown
    assert as_json(exam, diagnose(exam), "float16")["ranks"][1]["spread"] == spread


def test_a_host_is_busy_once_and_not_with_its_own_ranks():
    exam = healthy(2)
    for rank in exam.reports.ranks.values():
        rank.host = replace(MAC, load=1.0)
        rank.speeds = replace(FAST, spread=3.0)
    [line] = found(exam)
    assert line.startswith("warning: rank 0 (mac): busy: load average 1.0 a core") and "differ 3.0-fold; " in line
    for rank in exam.reports.ranks.values():
        rank.host = replace(MAC, cores=16)  # for two ranks of 16 threads
    assert found(exam) == []


def test_slow_links_are_not_shown_as_0():
    exam = healthy(2)
    exam.reports.links = [link_speed.LinkSpeed((0, 1), 2e-7, 4e4, 5e5, 1.5e6)]
    exam.reports.hop = 4e4
    shown = as_text(exam, diagnose(exam), "float16")
    row = next(line for line in shown.splitlines() if line.startswith("rank 0 (mac0) - rank 1 (mac1)"))
    assert row.split()[-6:] == ["0.2", "us", "4e-05", "0.0005", "0.002", "slowest"]
    assert "as in a hop: 4e-05 GB/s each" in shown


def test_mac_without_metal():
    exam = healthy()
    about(exam, 1, kernel="host", gpu=None)
    [line] = found(exam)
    assert line.startswith("warning: rank 1 (mac1): attention runs on the 'host' kernel")


def test_slow_link():
    exam = healthy()
    exam.reports.links[1] = replace(exam.reports.links[1], to_left=1e9)
    [line] = found(exam)
    assert line.startswith("warning: link 1-2: 1.00 GB/s, where others have 3.00") and "cable" in line
    assert exam.slowest_link == exam.reports.links[1]


@pytest.mark.parametrize(("size", "tensor"), [(4, 2), (6, 2), (6, 3), (3, 3)])
def test_slow_links_within_rows(size, tensor):
    """Slow links belong between rows, where less is sent."""
    exam = replace(healthy(size), tensor=tensor)
    for rank in range(0, size, tensor):
        exam.reports.links[rank] = replace(exam.reports.links[rank], to_left=1e9)
    rows = [line for line in found(exam) if line.startswith("warning: rows: ")]
    if size == tensor:  # there is one row, and every order has the same links
        assert not rows
        return
    [line] = rows
    assert (
        f"a row of {tensor} has 1.00 GB/s, and would have 3.00 in another order; begin the list of hosts with" in line
    )
    assert line.endswith("rank 1 (mac1)")
    exam.reports.links = exam.reports.links[-1:] + exam.reports.links[:-1]
    exam.reports.links = [replace(link, ranks=pair) for link, pair in zip(exam.reports.links, link_speed.pairs(size))]
    if tensor == 2:
        assert not [line for line in found(exam) if "rows" in line]


def test_rows_are_shown():
    exam = healthy(4)
    exam.reports.rows = [RowSpeed((0, 1), 50e-6, 2.5e9), RowSpeed((2, 3), 60e-6, 2e9)]
    assert "ranks 2, 3 (mac2, mac3)  60 us            2.00" in as_text(exam, [], "float16")
    assert as_json(exam, [], "float16")["rows"][0] == {"ranks": [0, 1], "latency_us": pytest.approx(50), "gb_s": 2.5}


def test_links_that_need_long_contexts():
    exam = healthy()
    exam.reports.hop = 0.117e9
    [line] = found(exam)
    assert line.startswith("warning: links: transfers hide behind compute only above 7") and "tokens" in line


def test_break_even_is_by_the_slowest_rank_and_what_links_carry_together():
    exam = healthy()
    assert exam.break_even == break_even(17e12, 3e9, 300e-6)
    exam.reports.ranks[1].speeds = replace(FAST, attention=5e12)
    exam.reports.hop = 2e9
    assert exam.break_even == break_even(5e12, 2e9, 300e-6)
    exam.reports.hop = None
    assert exam.break_even is None
