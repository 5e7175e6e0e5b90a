"""Tests of `ringattn launch`: its own errors, and what ranks see in real runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from launching import ROOT, environment, launch, start

from ringattn.cli import main
from ringattn.launcher import rank_status
from ringattn.launcher.rank_status import Pulse
from ringattn.transport.failures.status_file import FILE_BYTES, LINE_BYTES, PULSE


@pytest.mark.parametrize(
    ("arguments", "expected", "code"),
    [
        (["-n", "0", "true"], "'-n' / '--ranks': 0", 2),
        (["-n", "two", "true"], "'-n' / '--ranks': 'two'", 2),
        (["true"], "'-n'", 2),
        (["-n", "2"], "COMMAND", 2),
        (["-n", "2", "--threads", "0", "true"], "'--threads': 0", 2),
        (["-n", "2", "--timeout", "0", "true"], "'--timeout': 0", 2),
        (["-n", "2", "--tiemout", "1", "true"], "--tiemout", 2),
        (["-n", "2", "--mpiexec", "/no/mpiexec", "true"], "/no/mpiexec", 127),
        (["-n", "2", "--env", "NOT_SET_HERE", "true"], "--env: 'NOT_SET_HERE' is not set here", 2),
        (["-n", "2", "--env", "A B=1", "true"], "--env: 'A B=1', expected NAME=VALUE", 1),
        (["--hosts", "a", "--hostfile", "b", "true"], "both given", 2),
        (["-n", "3", "--hosts", "a,b", "true"], "-n: 3, expected at most 2, the slots of the hosts", 2),
        (["-n", "2", "no-such-program"], "no-such-program", 127),
        (["-n", "2", "no/such.py"], "no/such.py", 127),
        (["-n", "2", os.fspath(ROOT / "tests" / "test_launch.py") + "/"], "test_launch", 127),
    ],
)
def test_one_line_errors(arguments, expected, code):
    result = CliRunner().invoke(main, ["launch", *arguments])
    assert result.exit_code == code
    assert result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith("Error: ") and expected in result.stderr


def test_dry_run_prints_and_runs_nothing(script, tmp_path):
    path = script("open(sys.argv[1], 'w')")
    arguments = ["launch", "-n", "3", "--dry-run", path, str(tmp_path / "made"), "it's"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0 and not (tmp_path / "made").exists()
    assert " -n 3 " in result.stdout and result.stdout.endswith(f"{path} {tmp_path / 'made'} 'it'\"'\"'s'\n")


def test_help_imports_no_command():
    code = "import sys; from ringattn.cli import main; main(['-h'], standalone_mode=False)\n"
    code += "sys.exit('ringattn.cli.commands.demo' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert all(f"  {name}  " in shown.stdout for name in ("demo", "launch", "verify"))


def test_wrapper_and_library_agree_on_the_status_file():
    ours = rank_status.LINE_BYTES, rank_status.PULSE.format, rank_status.FILE_BYTES
    assert ours == (LINE_BYTES, PULSE.format, FILE_BYTES)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("program", "late", "kept"),
    [("while True: pass", 1, True), ("while True: pass", -60, False), ("import time; time.sleep(60)", 1, False)],
)
def test_a_rank_computes_without_a_pulse(program, late, kept):
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        try:
            time.sleep(0.5)
            file = bytearray(rank_status.FILE_BYTES)
            rank_status.PULSE.pack_into(file, rank_status.LINE_BYTES, process.pid, time.monotonic() - late)
            pulse = Pulse()
            assert not pulse.is_kept_late(file)  # no look before this one
            time.sleep(0.6)
            end = time.monotonic() + 20
            while not (found := pulse.is_kept_late(file)) and kept and time.monotonic() < end:
                time.sleep(0.1)  # on a busy machine the program computes later
            assert found == kept
            rank_status.PULSE.pack_into(file, rank_status.LINE_BYTES, process.pid, time.monotonic())
            time.sleep(0.1)
            assert not pulse.is_kept_late(file)  # it came, and is late again
        finally:
            process.kill()
    assert not pulse.is_kept_late(file)
    time.sleep(0.6)
    assert not pulse.is_kept_late(file)  # dead


@pytest.mark.ranks
def test_ranks_environment_and_arguments(script, tmp_path):
    path = script(
        "import json\n"
        "names = ('OMP_NUM_THREADS', 'RINGATTN_THREADS', 'RINGATTN_TIMEOUT', 'RINGATTN_LAUNCH', 'PYTHONUNBUFFERED')\n"
        "seen = [os.environ.get(name) for name in names]\n"
        "status = os.environ['RINGATTN_STATUS']\n"
        "seen += [open(status, 'rb').read() == bytes(4096), status, sys.argv[1:]]\n"
        f"open(os.path.join({str(tmp_path)!r}, f'{{rank}}.json'), 'w').write(json.dumps(seen))\n"
    )
    given = ["a b", "q'\"", "", ":", "\\:", "$HOME", "x\ny", "*", "-n", "--", "é"]
    result = launch("-n", "3", "--threads", "2", "--timeout", "20", path, *given)
    assert (result.returncode, result.stderr) == (0, "")
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [one[:6] for one in seen] == [["2", "2", "20", "1", "1", True]] * 3
    assert [one[7] for one in seen] == [given] * 3
    assert len({one[6] for one in seen}) == 3 and not any(os.path.exists(os.path.dirname(one[6])) for one in seen)


@pytest.mark.ranks
def test_programs_that_are_not_python_and_stdin():
    result = launch("-n", "2", "sh", "-c", "cat; echo done >&2", stdin="one\ntwo\n")
    assert (result.returncode, result.stdout) == (0, "one\ntwo\n")
    assert result.stderr == "done\ndone\n"


@pytest.mark.ranks
def test_lines_with_their_rank(script):
    """Whole lines, also when written in pieces, and a question that waits for its answer."""
    path = script(
        "for i in range(3):\n"
        "    for piece in (str(i), ' ', 'x' * 5, '\\n'): os.write(1, piece.encode())\n"
        "print('err', file=sys.stderr)\n"
        "if rank == 0: print('name? ', end=''); print('hello', sys.stdin.readline().strip(), end='')\n"
    )
    process = start("-n", "2", "--prefix", path)
    seen = ""
    while "name? " not in seen:
        seen += os.read(process.stdout.fileno(), 100).decode()
    out, err = process.communicate("Ada\n", timeout=30)
    lines = [f"[{rank}] {i} xxxxx" for rank in (0, 1) for i in range(3)]
    question, answer = "[0] name? ", "hello Ada"  # lines of the other rank may come between
    found = sorted(filter(None, (seen + out).replace(question, "\n").replace(answer, "\n").splitlines()))
    assert found == lines and sorted(err.splitlines()) == ["[0] err", "[1] err"], seen + out
    assert (seen + out).index(question) < (seen + out).index(answer)


@pytest.mark.ranks
def test_mpi4py_works_under_the_wrapper(script):
    path = script(
        "from mpi4py import MPI\ncomm = MPI.COMM_WORLD\ntotal = comm.allreduce(comm.rank + 1)\n"
        "if comm.rank == 1: print(comm.size, total)\n"
    )
    result = launch("-n", "3", path)
    assert (result.returncode, result.stdout) == (0, "3 6\n"), result.stderr
