"""Real runs of `ringattn launch` that fail or are ended: nothing is left running, and the cause is named."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace

import pytest
from launching import IGNORE, NOTE_PID, launch, living, parents, pids, start
from spawn import under_load

from ringattn.launcher.rank_table import End, RankEntry, RankTable
from ringattn.launcher.supervisor import SIGNAL_GRACE, Supervisor
from ringattn.transport.failures.cause import Cause


@pytest.mark.ranks
def test_exit_code_of_the_first_that_failed(script, tmp_path):
    path = script(NOTE_PID + IGNORE + "if rank == 1: sys.exit(7)\ntime.sleep(0.7 if rank == 2 else 60)\nsys.exit(3)\n")
    begin = time.monotonic()
    result = launch("-n", "3", path, str(tmp_path))
    assert result.returncode == 7 and time.monotonic() - begin < under_load(8)
    assert living(pids(tmp_path, 3)) == []
    assert "rank 1 " in result.stderr and "exited with code 7; ending the ranks still running: 0" in result.stderr


@pytest.mark.ranks
def test_early_success_is_no_failure(script):
    result = launch("-n", "2", script("time.sleep(1.5 * rank)\nprint(rank, flush=True)\n"))
    assert (result.returncode, result.stdout, result.stderr) == (0, "0\n1\n", "")


@pytest.mark.ranks
@pytest.mark.parametrize("written", [True, False])
def test_killed_rank_is_named_with_its_place(script, tmp_path, written):
    path = script(
        NOTE_PID + f"if rank != 1: time.sleep({60 if written else 0}); sys.exit(0)\n"
        f"if {written}:\n"
        '    place = b\'{"rank": 1, "call": "ring_attention", "hop": 3}\'\n'
        "    with open(os.environ['RINGATTN_STATUS'], 'r+b') as f: f.write(place)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = launch("-n", "2", path, str(tmp_path))
    host = os.uname().nodename
    where = " in ring_attention, hop 3" if written else ""
    assert f"ringattn: rank 1 ({host}) was killed by SIGKILL{where}\n" in result.stderr
    assert result.returncode == 137
    assert living(pids(tmp_path, 2)) == []


@pytest.mark.ranks
def test_rank_killed_inside_mpi(script, tmp_path):
    path = script(
        "from mpi4py import MPI\ncomm = MPI.COMM_WORLD\ncomm.barrier()\n" + NOTE_PID + "sys.stdout.flush()\n"
        "if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ncomm.barrier()\n"
    )
    result = launch("-n", "3", path, str(tmp_path))
    assert result.returncode == 137 and "ringattn: rank 1 " in result.stderr
    assert living(pids(tmp_path, 3)) == []


@pytest.mark.ranks
def test_mpi_abort_gives_its_code(script, tmp_path):
    path = script(
        "from mpi4py import MPI\ncomm = MPI.COMM_WORLD\n" + NOTE_PID + "comm.barrier()\n"
        "if rank == 1: comm.Abort(9)\ncomm.barrier()\n"
    )
    result = launch("-n", "2", path, str(tmp_path))
    assert result.returncode == 9
    assert living(pids(tmp_path, 2)) == []


@pytest.mark.ranks
@pytest.mark.parametrize("code", [0, 5])
def test_stopped_rank_is_swept(script, tmp_path, code):
    path = script(NOTE_PID + f"if rank == 1: os.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(0.3)\nsys.exit({code})\n")
    begin = time.monotonic()
    result = launch("-n", "3", path, str(tmp_path))
    assert time.monotonic() - begin < under_load(7)
    assert result.returncode == (code or 137)
    assert "1 (stopped)" in result.stderr
    assert living(pids(tmp_path, 3)) == []


def test_killed_rank_counts_where_mpiexec_ends_with_zero():
    supervisor = Supervisor(1, RankTable([]), 60.0)
    end = End(Cause("ended", 0, "mac", detail="was killed", exit_code=-signal.SIGKILL), 0.0, True, False)
    supervisor.ranks["0"] = RankEntry("0", "mac", None, None, None, end)
    supervisor._mpiexec = SimpleNamespace(returncode=0)
    assert supervisor.conclude() == 137


@pytest.mark.parametrize(("ended", "given_up"), [(1.0, True), (4.5, False)])
def test_a_rank_that_waits_for_a_ring_has_time_after_the_last_end(ended: float, given_up: bool) -> None:
    """The ring may have opened while it waited, and the other rank be done already."""
    supervisor = Supervisor(2, RankTable([]), 3.0)
    end, here = End(Cause("ended", 1, "mac"), ended, False, False), SimpleNamespace(local=True)
    supervisor.ranks["0"] = RankEntry("0", "mac", None, None, here, opening_since=0.5)
    supervisor.ranks["1"] = RankEntry("1", "mac", None, None, here, end)
    supervisor._enforce_init_timeout(now=5.0)
    assert supervisor._gave_up == given_up


@pytest.mark.ranks
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_every_rank_gently(script, tmp_path, number):
    path = script(
        "def leave(n, f): os.write(1, b'got %d\\n' % n); time.sleep(0.3 * rank); os.write(1, b'left\\n'); sys.exit(0)\n"
        "for s in (2, 15, 1): signal.signal(s, leave)\n" + NOTE_PID + "time.sleep(60)\n"
    )
    process = start("-n", "3", path, str(tmp_path))
    running = pids(tmp_path, 3)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert "was killed" not in err
    assert out.count(f"got {int(number)}\n") == 3 and out.count("left\n") == 3  # once each, and with time to clean up
    assert living(running) == []


@pytest.mark.ranks
@pytest.mark.parametrize("twice", [False, True])
def test_stubborn_ranks_are_killed(script, tmp_path, twice):
    path = script(IGNORE + "if os.fork() == 0: rank += 10\n" + NOTE_PID + "time.sleep(60)\n")
    process = start("-n", "2", path, str(tmp_path))
    running = pids(tmp_path, 4)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    if twice:
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert (time.monotonic() - begin < SIGNAL_GRACE) is twice
    assert living(running) == []


@pytest.mark.ranks
def test_killed_launcher_leaves_nothing(script, tmp_path):
    process = start("-n", "2", script(IGNORE + NOTE_PID + "time.sleep(60)\n"), str(tmp_path))
    running = pids(tmp_path, 2)
    process.kill()
    process.communicate(timeout=20)  # returns when nobody holds its pipes any more
    assert living(running) == []


@pytest.mark.ranks
def test_killed_mpiexec_ends_the_ranks(script, tmp_path):
    path = script(IGNORE + NOTE_PID + "time.sleep(60)\n")
    process = start("-n", "2", path, str(tmp_path))
    running = pids(tmp_path, 2)
    [child] = [pid for pid, parent in parents().items() if parent == process.pid]
    os.kill(child, signal.SIGKILL)
    process.communicate(timeout=20)
    assert process.returncode == 137
    assert living(running) == []


@pytest.mark.ranks
def test_killed_wrapper_ends_everything(script, tmp_path):
    process = start("-n", "3", script(IGNORE + NOTE_PID + "time.sleep(60)\n"), str(tmp_path))
    running = pids(tmp_path, 3)
    os.kill(parents()[running[1]], signal.SIGKILL)
    begin = time.monotonic()
    process.communicate(timeout=20)
    assert process.returncode in (9, 137)  # MPICH's mpiexec ends with the number of the signal
    assert time.monotonic() - begin < under_load(8)
    assert living(running) == []


@pytest.mark.ranks
def test_temporary_directory_goes_on_failure_too(script, tmp_path):
    result = launch("-n", "2", script("sys.exit(rank)\n"), TMPDIR=str(tmp_path))
    assert result.returncode == 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("ringattn")] == []


@pytest.mark.ranks
def test_output_is_whole_when_a_rank_fails(script):
    result = launch("-n", "2", script("sys.stdout.write(('x' * 99 + '\\n') * 10000)\nsys.exit(rank)\n"))
    assert result.returncode == 1 and len(result.stdout) == 2 * 10000 * 100
