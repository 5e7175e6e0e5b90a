"""Real runs of ``ringattn doctor``, and a time limit that always holds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from spawn import ROOT, under_load

from launch.virtual import Cluster
from ringattn.cli import main
from ringattn.doctor import runner
from ringattn.launcher import mpiexec


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
