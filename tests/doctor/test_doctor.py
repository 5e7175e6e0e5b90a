"""``ringattn doctor``: every finding, the output, the measurements, and a time limit that always holds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace

import pytest
from click.testing import CliRunner
from spawn import ROOT

import ringattn
from launch.virtual import Cluster
from ringattn.cli import main
from ringattn.doctor import compute_speed, connectivity, host_info, link_speed, records, runner
from ringattn.doctor.breakeven import break_even
from ringattn.doctor.compute_speed import ComputeSpeeds
from ringattn.doctor.connectivity import FailedConnection
from ringattn.doctor.diagnosis import diagnose
from ringattn.doctor.diagnosis.examination import Examination
from ringattn.doctor.output import as_json, as_text
from ringattn.doctor.records import Library, RankReport, RankReports
from ringattn.doctor.row_speed import RowSpeed
from ringattn.doctor.runner import launcher_message
from ringattn.errors import RingError
from ringattn.launcher import mpiexec
from ringattn.launcher.hostfile import Host
from ringattn.launcher.preflight import Trouble
from ringattn.rendezvous.handshake import make_key
from ringattn.transport.handshake import introduce
from ringattn.transport.solo import SoloRing

MAC = host_info.HostInfo(
    host="mac",
    system="macOS 26.2",
    chip="Apple M3 Ultra",
    memory=512 << 30,
    cores=32,
    threads=16,
    python="/venv/bin/python",
    python_version="3.12.1",
    ringattn="0.1.0",
    mlx="0.32.4",
    mpi4py="4.1.2",
    numpy="2.4.6",
    code="abc",
    metal=True,
    gpu="Apple M3 Ultra",
    kernel="metal",
    load=0.1,
    blas_advice=None,
    float32="full",
)
LINUX = replace(MAC, system="Debian, Linux 6", metal=False, gpu=None, kernel="host")
FAST = ComputeSpeeds(mlx=17e12, numpy=2e12, float16=17e12, bfloat16=17e12, attention=17e12, spread=1.1)
MPICH = Library("MPICH 5.0.2", "MPICH", "multiple", 3)


class Clock:
    """Clock that advances only in `sleep`, in place of the module `time`."""

    def __init__(self) -> None:
        self._now = 0.0

    def perf_counter(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds


def under_load(seconds: float) -> float:
    """Time limit for work that takes `seconds` on an idle machine, longer on a machine with other work."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def healthy(size: int = 3) -> Examination:
    """Examination of Macs on Thunderbolt without any problem."""
    ranks = {
        n: RankReport(replace(MAC, host=f"mac{n}"), FAST, replace(MPICH, size=size), doing="measuring a hop", done=True)
        for n in range(size)
    }
    measured = [link_speed.LinkSpeed(pair, 300e-6, 3.1e9, 3.2e9, 3e9) for pair in link_speed.pairs(size)]
    return Examination(size, RankReports(ranks, measured, 3e9), hosts=tuple(f"mac{n}" for n in range(size)))


def about(exam: Examination, number: int, **changed: object) -> None:
    """Change the host information of rank `number`."""
    rank = exam.reports.ranks[number]
    assert rank.host is not None
    rank.host = replace(rank.host, **changed)


def found(exam: Examination) -> list[str]:
    return [str(finding) for finding in diagnose(exam)]


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


# What people and programs see


def test_table():
    exam = healthy()
    exam.reports.links[2] = replace(exam.reports.links[2], to_right=2.9e9)
    shown = as_text(exam, diagnose(exam), "float16")
    row = next(line for line in shown.splitlines() if line.startswith("rank 2 (mac2) - rank 0 (mac0)"))
    assert row.split()[-6:] == ["300", "us", "2.900", "3.200", "3.000", "slowest"]
    assert shown.count("slowest") == 1 and "macOS 26.2  Apple M3 Ultra  512 GiB  32 (16 a rank)" in shown
    assert "0,1,2  0.1.0     0.32.4  2.4.6  4.1.2   MPICH 5.0.2  multiple     /venv/bin/python (3.12.1)" in shown
    assert f"from {exam.break_even:,} tokens per rank on (32/8 heads of 128, float16, causal)" in shown
    assert shown.endswith("\n\nnothing is wrong")


def test_table_of_almost_nothing():
    exam = Examination(2, RankReports({1: RankReport()}), exit_status=1, launcher_message="boom")
    assert as_text(exam, diagnose(exam), "float16").splitlines()[0].startswith("error: rank 0: did not start (boom); ")


def test_json():
    exam = healthy()
    about(exam, 1, mlx="0.1")
    report = json.loads(json.dumps(as_json(exam, diagnose(exam), "float16")))
    assert (report["ok"], report["size"], report["hop_gb_s"], report["slowest_link"]) == (False, 3, 3.0, [0, 1])
    assert report["links"][0] == {
        "ranks": [0, 1],
        "latency_us": pytest.approx(300),
        "to_right_gb_s": 3.1,
        "to_left_gb_s": 3.2,
        "both_gb_s": 3.0,
    }
    assert report["ranks"][1]["host"]["mlx"] == "0.1" and report["ranks"][0]["gflop_s"]["attention"] == 17000
    assert report["findings"][0]["fatal"] and report["findings"][0]["where"] == "mlx"


# What ranks say


def test_records_come_back_whatever_is_around_them(capfd):
    records.write_record(1, doing="timing", host=asdict(MAC))
    records.write_record(1, speeds=asdict(FAST), mpi=asdict(MPICH))
    records.write_record(0, row=asdict(RowSpeed((0, 1), 1e-5, 2.0)))
    records.write_record(0, link=asdict(link_speed.LinkSpeed((0, 1), 1e-5, 1.0, 2.0, 3.0)), hop=4.0, done=True)
    lines = capfd.readouterr().out.splitlines()
    noise = ["hello", f"[2] {records.MARK}" + '{"rank": 2, "cut o', ""]
    report = records.parse_records("\n".join([*noise, *(f"mac1: {line}" for line in lines)]))
    assert report.ranks == {0: RankReport(done=True), 1: RankReport(MAC, FAST, MPICH, doing="timing")}
    assert (report.links, report.hop) == ([link_speed.LinkSpeed((0, 1), 1e-5, 1.0, 2.0, 3.0)], 4.0)
    assert report.rows == [RowSpeed((0, 1), 1e-5, 2.0)]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("Traceback\n  x\nringattn: rank 1 was killed\nringattn: more\n", "rank 1 was killed"),
        ("Warning: w\nError: a: no Python\nError: b: no ssh\n", "a: no Python; b: no ssh"),
        ("ssh: refused\n\n", "ssh: refused"),
        ("", ""),
    ],
)
def test_launcher_message(said, words):
    assert launcher_message(said) == words


# HostInfo and measurements


def test_facts_of_this_host():
    report = host_info.collect()
    assert report.python == sys.executable and report.cores >= 1 and report.memory > 1 << 28
    assert report.system and report.chip and json.loads(json.dumps(asdict(report))) == asdict(report)


@pytest.mark.parametrize(
    ("environment", "advice"),
    [
        ({}, "advice"),
        ({"RINGATTN_BLAS": "mlx"}, "unset RINGATTN_BLAS, so that"),
        ({"RINGATTN_BLAS": "numpy", "LD_PRELOAD": "libc.so"}, "advice"),
        ({"RINGATTN_BLAS": "mlx", "LD_PRELOAD": "/usr/lib/libopenblas.so.0"}, "unset RINGATTN_BLAS and LD_PRELOAD, so"),
    ],
)
def test_only_what_is_set_is_to_be_unset(monkeypatch, environment, advice):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(host_info.sgemm, "advice", lambda: "advice")
    for name in ("RINGATTN_BLAS", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert host_info.collect().blas_advice.startswith(advice)


def test_fingerprint_changes_with_sources_alone(tmp_path):
    """C files do not count, since they are not installed."""
    (tmp_path / "a.py").write_text("1")
    one = host_info.fingerprint(tmp_path)
    (tmp_path / "a.txt").write_text("1")
    (tmp_path / "a.c").write_text("1")
    assert host_info.fingerprint(tmp_path) == one
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert host_info.fingerprint(tmp_path) != one


def test_fastest_stops_at_what_takes_long_enough(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(compute_speed, "time", clock)
    monkeypatch.setattr(compute_speed, "ENOUGH", 0.02)
    tried = []

    def work(size: int):
        tried.append(size)
        return lambda: clock.sleep(size / 1000), 1e6 * size

    assert 1e8 < compute_speed.fastest(work, (1, 10, 30, 100)).flops <= 1e9
    assert tried == [1, 10, 30]


def test_a_disturbed_timing_does_not_count(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(compute_speed, "time", clock)
    pauses = iter([0.05, 0.05, 0.05, 0.001])
    assert compute_speed.fastest(lambda size: (lambda: clock.sleep(next(pauses)), 1e6), (1,)).flops > 1e8


@pytest.mark.parametrize(
    ("seconds", "spread"), [((0.9, 0.3, 0.1, 0.2), 2.0), ((9.0, 0.1, 0.1, 0.1), 1.0), ((0.1, 0.4, 0.4, 0.4), 4.0)]
)
def test_the_spread_of_equal_measurements(monkeypatch, seconds, spread):
    """The first measurement does not count for the median, only for the best."""
    times = iter(seconds)
    monkeypatch.setattr(compute_speed, "_time", lambda call: next(times))
    found = compute_speed.fastest(lambda size: (lambda: None, 1e6), (1,))
    assert found == (pytest.approx(1e7), pytest.approx(spread))


def test_ways_between_hosts(monkeypatch):
    """Of three ranks on two hosts; then nobody answers at the address that others call."""
    hosts = ["127.0.0.1", "127.0.0.1", "127.0.0.2"]

    def find_all():
        with closing(connectivity.Coordinator("127.0.0.1", 3)) as coordinator, ThreadPoolExecutor(3) as pool:
            return list(
                pool.map(lambda rank: connectivity.find_failed_connections(coordinator.endpoint, rank, hosts), range(3))
            )

    assert find_all() == [[]] * 3
    monkeypatch.setattr(connectivity, "derive_key", lambda key, purpose: make_key())  # every rank is another machine
    told = find_all()
    assert [(way.caller, way.peer) for way in told[0]] == [(0, 2), (1, 2), (2, 0), (2, 1)] and told == [told[0]] * 3
    another = "another machine or another run of ringattn answers there"
    assert told[0][0].why == f"127.0.0.2: {another}, 127.0.0.1: {another}"


def test_each_rank_answers_with_a_key_of_its_own():
    key = make_key()
    with closing(connectivity.AnsweringListener(key, 1)) as listener:
        here = ("127.0.0.1", listener.port)
        assert connectivity._try([here], key, 0, 1) is None
        assert (
            connectivity._try([here], key, 0, 2)
            == "127.0.0.1: another machine or another run of ringattn answers there"
        )
        assert connectivity._try([("nowhere.invalid", listener.port), here], key, 0, 1) is None


def test_a_doctor_out_of_reach_is_named():
    with closing(connectivity.Coordinator("127.0.0.1", 1)) as coordinator:
        endpoint = coordinator.endpoint
    with pytest.raises(RingError, match=r"^no TCP connection to the doctor at 127.0.0.1: Connection refused$"):
        connectivity.CoordinatorClient(endpoint, 0)


def test_a_rank_that_leaves_is_told_to_the_others():
    with closing(connectivity.Coordinator("127.0.0.1", 2)) as coordinator:
        first, second = (connectivity.CoordinatorClient(coordinator.endpoint, rank) for rank in range(2))
        second.close()
        with closing(first), pytest.raises(RingError, match="^a rank left before all ranks had sent their results$"):
            first.gather(["x"])


def test_pairs():
    assert (
        link_speed.pairs(1) == []
        and link_speed.pairs(2) == [(0, 1)]
        and link_speed.pairs(3) == [(0, 1), (1, 2), (2, 0)]
    )


class SlowRing(SoloRing):
    """Ring of one rank that sends to itself, `rate` bytes per second by `clock`."""

    rate = 125e6  # 1 Gbit/s
    sent = 0
    clock: Clock

    def send(self, load, *, tag, after=(), step=1):
        self.sent += sum(map(len, load()))
        self.clock.sleep(sum(map(len, load())) / self.rate)

    def recv(self, buffers, *, tag, after=(), step=1):
        pass

    def wait(self, *transfers):
        pass


def test_bandwidth_of_a_slow_link_takes_no_time(monkeypatch):
    ring = SlowRing(10.0)
    ring.clock = Clock()
    monkeypatch.setattr(link_speed, "time", ring.clock)
    start = ring.clock.perf_counter()
    assert link_speed.measure_hop(ring) == pytest.approx(125e6, rel=0.3)
    assert ring.clock.perf_counter() - start < 3 and 12e6 < ring.sent < 100e6


def test_what_breaks_a_link_names_it(monkeypatch):
    """The name has the ranks of the ring, not those of the pair."""

    def broken(pair):
        raise RingError("rank 1 (mac) left")

    monkeypatch.setattr(link_speed, "_latency", broken)
    with pytest.raises(RingError, match=r"^link 2-0: rank 1 \(mac\) left$"):
        link_speed.measure_link(SoloRing(10.0), (2, 0))


def test_size_that_takes_long_enough():
    assert link_speed.next_size(1 << 20, 0.05) == 1 << 21
    assert (
        link_speed.next_size(1 << 20, 1e-9) == link_speed.MOST
        and link_speed.next_size(1 << 18, 100) == link_speed.LEAST
    )


# Real runs


def doctor(*arguments: str, **environment: str):
    return CliRunner(env=environment).invoke(main, ["doctor", *arguments])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-n", "0"], "'-n' / '--ranks': 0"),
        (["--heads", "32/7"], "32/7"),
        (["--head-dim", "0"], "'--head-dim': 0"),
        (["--dtype", "int8"], "int8"),
        (["--timeout", "0"], "'--timeout': 0"),
    ],
)
def test_one_line_errors(arguments, expected):
    done = doctor(*arguments)
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and expected in done.stderr


@pytest.mark.ranks
def test_two_local_ranks():
    start = time.monotonic()
    done = doctor("-n", "2", "--json")
    report = json.loads(done.stdout)
    assert (done.exit_code, report["ok"], report["size"]) == (0, True, 2), done.stdout
    assert [rank["mpi"]["size"] for rank in report["ranks"]] == [2, 2] and report["ranks"][1]["done"]
    [link] = report["links"]
    assert link["ranks"] == report["slowest_link"] == [0, 1] and link["to_left_gb_s"] > 0.001 and link["latency_us"] > 0
    assert report["break_even_tokens"] >= 1 and not [f for f in report["findings"] if f["fatal"]]
    assert time.monotonic() - start < under_load(15)


@pytest.fixture(scope="module")
def cluster():
    with Cluster(3) as one:
        yield one


def doctor_there(cluster: Cluster, *arguments: str):
    """Exit status, JSON and standard error of the doctor on a virtual cluster."""
    line = [sys.executable, "-m", "ringattn.cli", "doctor", "--json", *arguments]
    environment = {**cluster.environment, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=100)
    return done.returncode, json.loads(done.stdout or "null"), done.stderr


@pytest.mark.hosts
def test_hosts_that_can_be_reached_are_examined_without_the_others(cluster):
    hosts = [cluster.addresses[0], "mac9", cluster.addresses[2]]
    code, report, _ = doctor_there(cluster, "--hosts", ",".join(hosts))
    assert (code, report["ok"], report["size"]) == (1, False, 2)
    assert [rank["host"]["host"] for rank in report["ranks"]] == ["mac0", "mac2"] and len(report["links"]) == 1
    [finding] = [finding for finding in report["findings"] if finding["fatal"]]
    assert finding["where"] == "host mac9" and finding["what"].startswith("ssh: Could not resolve hostname mac9")
    assert not any(address in finding["remedy"] for address in cluster.addresses)


@pytest.mark.hosts
def test_a_dead_way_between_two_hosts_is_named(cluster):
    """Both hosts reach this machine and the third host, and MPI would wait without a message."""
    space = f"{cluster.bridge}h2"
    to = f"{cluster.addresses[1]}/32"
    subprocess.run(["ip", "-n", space, "route", "add", "blackhole", to], check=True)
    begin = time.monotonic()
    code, report, _ = doctor_there(cluster, "--hosts", ",".join(cluster.addresses))
    subprocess.run(["ip", "-n", space, "route", "del", "blackhole", to], check=True)
    assert code == 1 and time.monotonic() - begin < 40
    [finding] = [finding for finding in report["findings"] if finding["fatal"]]
    assert finding["where"] == "mac1 and mac2" and "from mac1 to mac2" in finding["what"], finding
    assert [rank["host"]["host"] for rank in report["ranks"]] == cluster.names


@pytest.mark.hosts
def test_fewer_ranks_than_slots(cluster):
    """The doctor does not wait for hosts without a rank."""
    hosts = ",".join(f"{address}:2" for address in cluster.addresses)
    code, report, said = doctor_there(cluster, "-n", "3", "--hosts", hosts)
    assert (code, report["size"]) == (0, 3), report["findings"]
    assert [rank["host"]["host"] for rank in report["ranks"]] == ["mac0", "mac0", "mac1"]


@pytest.mark.hosts
def test_no_host_that_can_be_reached(cluster):
    code, report, _ = doctor_there(cluster, "--hosts", "mac8,mac9")
    assert (code, report["ok"], report["size"], report["ranks"], report["links"]) == (1, False, 0, [], [])
    assert [finding["where"] for finding in report["findings"]] == ["host mac8", "host mac9"]


def test_without_mpi_the_rest_is_reported(monkeypatch):
    monkeypatch.setattr(mpiexec.shutil, "which", lambda *args, **kwargs: None)
    done = doctor()
    assert done.exit_code == 1
    assert "GFLOP/s of a rank" in done.stdout and "not started" in done.stdout
    assert any(line.startswith("error: MPI: no mpiexec found") for line in done.stdout.splitlines())


@pytest.mark.ranks
def test_thread_level_of_a_real_run():
    done = doctor("-n", "2", MPI4PY_RC_THREAD_LEVEL="serialized")
    assert done.exit_code == 1
    assert "\nerror: rank 1 (" in done.stdout and "MPI gives thread level 'serialized'" in done.stdout


@pytest.mark.ranks
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_rank_that_dies_or_hangs(tmp_path, number, monkeypatch):
    """A rank ends or stops before its first record. Rank 0 needs time to write its own record."""
    rank = "(os.environ.get('PMI_RANK') or os.environ.get('OMPI_COMM_WORLD_RANK'))"
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        f"if {rank} == '1' and 'ringattn.doctor.worker' in sys.orig_argv and '-IS' not in sys.orig_argv:\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    limit = 60 if number == signal.SIGKILL else round(under_load(6))
    monkeypatch.setattr(runner, "HEARTBEAT_TIMEOUT", 2.0 * limit)  # the doctor's own limit has to come first
    start = time.monotonic()
    done = doctor("-n", "2", "--timeout", str(limit), PYTHONPATH=path)
    assert time.monotonic() - start < under_load(20)
    assert done.exit_code == 1 and "error: rank 1" in done.stdout
    if number == signal.SIGKILL:
        assert "was killed by SIGKILL" in done.stdout
    else:
        assert f"not finished after {limit} s (rank 0 (" in done.stdout
