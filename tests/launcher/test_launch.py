"""`ringattn launch`: command lines, what ranks see, and that whatever happens nothing is left running."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from spawn import under_load

from ringattn.cli import main
from ringattn.errors import LaunchError
from ringattn.launcher import mpiexec, rank_status
from ringattn.launcher.mpiexec import Mpiexec
from ringattn.launcher.processes import start_time
from ringattn.launcher.rank_status import Pulse, parse_status
from ringattn.launcher.rank_table import End, RankEntry, RankTable
from ringattn.launcher.rank_wrapper import prepare_host, unescape
from ringattn.launcher.supervisor import SIGNAL_GRACE, Supervisor
from ringattn.transport.failures.cause import Cause
from ringattn.transport.failures.status_file import FILE_BYTES, LINE_BYTES, PULSE

ROOT = Path(__file__).parents[2]
RANK = "import os, signal, sys, time\nrank = int(os.environ.get('PMI_RANK', os.environ.get('OMPI_COMM_WORLD_RANK')))\n"
IGNORE = "for s in (signal.SIGTERM, signal.SIGINT): signal.signal(s, signal.SIG_IGN)\n"
NOTE_PID = "open(os.path.join(sys.argv[1], str(rank)), 'w').write(str(os.getpid()))\n"


@pytest.fixture
def script(tmp_path):
    """Write a program and return its path. It knows its `rank`."""

    def write(body: str) -> str:
        path = tmp_path / "program.py"
        path.write_text(RANK + body)
        return str(path)

    return write


def _environment(**changed: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    names = ("NUM_THREADS", "MAXIMUM_THREADS", "RINGATTN")
    kept = {name: value for name, value in os.environ.items() if not any(part in name for part in names)}
    return {**kept, "PYTHONPATH": path, **changed}


def start(*arguments: str, cwd: str | Path | None = None, **changed: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "ringattn.cli", "launch", *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    heed = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # nohup's programs inherit that it is ignored
    return subprocess.Popen(line, text=True, env=_environment(**changed), cwd=cwd, preexec_fn=heed, **pipes)


def launch(*arguments: str, stdin: str = "", **changed: str) -> subprocess.CompletedProcess[str]:
    process = start(*arguments, **changed)
    try:
        out, err = process.communicate(stdin, timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()  # the ranks notice
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def pids(folder: Path, count: int) -> list[int]:
    """The pids that `count` ranks have noted in `folder`."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        notes = [path.read_text() for path in folder.iterdir() if path.name.isdigit()]
        if len(notes) == count and all(notes):
            return [int(note) for note in notes]
        time.sleep(0.01)
    raise AssertionError(f"{count} ranks expected, {sorted(folder.iterdir())} started")


def parents() -> dict[int, int]:
    """The parent of every process."""
    line = ["ps", "-A", "-o", "pid=", "-o", "ppid="]
    shown = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    return {int(pid): int(parent) for pid, parent in map(str.split, shown.splitlines())}


def living(processes: list[int]) -> list[int]:
    return [pid for pid in processes if start_time(pid)]


# Command lines


@pytest.mark.ranks
@pytest.mark.parametrize("code", [0, 5])
def test_dry_run_prints_a_line_that_runs(script, code):
    """Of mpiexec alone, with nobody to report to; a rank that fails is then MPI's affair."""
    told = "f\"{rank} {sys.argv[1:]} {os.environ['RINGATTN_THREADS']}\\n\""  # in one piece, lest ranks' pieces mix
    path = script(f"sys.stdout.write({told})\nsys.exit(int(sys.argv[2]))")
    printed = launch("-n", "2", "--threads", "3", "--dry-run", path, "a b", str(code), ":").stdout
    done = subprocess.run(["sh", "-c", printed], capture_output=True, text=True, timeout=30, env=_environment())
    told = [f"{rank} ['a b', '{code}', ':'] 3" for rank in range(2)]
    assert bool(done.returncode) is bool(code), done.stderr
    assert code or sorted(done.stdout.splitlines()) == told  # MPI may drop what a job printed that fails


def test_mpich_command_line():
    line = mpiexec.build_command(Mpiexec("/x/mpiexec", "MPICH"), 3, ["prog", "a b", "-n", ":", "\\:"])
    assert line[:3] == ["/x/mpiexec", "-n", "3"]
    assert line[3:5] == [sys.executable, "-IS"]
    assert line[-6:] == ["--", "prog", "a b", "-n", "\\:", "\\\\:"]
    assert [unescape(argument) for argument in line[-2:]] == [":", "\\:"]


def test_ringattn_runs_under_this_python_whatever_path_says():
    line = mpiexec.build_command(Mpiexec("/x/mpiexec", "MPICH"), 2, ["ringattn", "generate"])
    assert line[-5:] == ["--", sys.executable, "-m", "ringattn.cli", "generate"]
    mpiexec.check_command(["ringattn", "generate"])


@pytest.mark.parametrize("root", [False, True])
def test_open_mpi_command_line(root):
    line = mpiexec.build_command(Mpiexec("/x/mpiexec", "Open MPI"), 4, ["dir/prog.py", "x"], root=root)
    assert ("--allow-run-as-root" in line) is root
    assert " --map-by :OVERSUBSCRIBE --bind-to none -n 4 " in " ".join(line)
    assert line[-4:] == ["--", sys.executable, "dir/prog.py", "x"]


@pytest.mark.parametrize(
    ("version", "flavour"),
    [("HYDRA build details:\n Version: 5.0.2", "MPICH"), ("mpiexec (Open MPI) 5.0.11", "Open MPI")],
)
def test_tells_the_flavours(version, flavour):
    assert mpiexec.parse_flavour("mpiexec", version) == flavour


def test_unknown_mpiexec_is_one_line(tmp_path):
    program = tmp_path / "mpiexec"
    program.write_text("#!/bin/sh\necho LAM 7\necho more\n")
    program.chmod(0o755)
    result = CliRunner().invoke(main, ["launch", "-n", "2", "--mpiexec", str(program), "true"])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1 and "LAM 7" in result.stderr and str(program) in result.stderr


def test_no_mpiexec_names_the_remedy(monkeypatch):
    monkeypatch.setattr(mpiexec.shutil, "which", lambda *args, **kwargs: None)
    with pytest.raises(LaunchError, match=r"pip install 'ringattn\[mpi\]'"):
        mpiexec.find_mpiexec()


def fake_mpiexec(folder: Path, version: str, name: str = "mpiexec") -> str:
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(f"#!/bin/sh\necho '{version}'\n")
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize(
    ("library", "chosen"), [(None, "beside"), ("MPICH", "beside"), ("Open MPI", "path"), ("LAM", "beside")]
)
def test_mpiexec_of_the_library_comes_first_then_the_one_beside_python(monkeypatch, tmp_path, library, chosen):
    fake_mpiexec(tmp_path / "unknown", "LAM 7")
    found = {
        "beside": Mpiexec(fake_mpiexec(tmp_path / "beside", "HYDRA build details"), "MPICH"),
        "path": Mpiexec(fake_mpiexec(tmp_path / "path", "mpiexec (Open MPI) 5.0.11"), "Open MPI"),
    }
    monkeypatch.setenv("PATH", os.pathsep.join(str(tmp_path / name) for name in ("unknown", "path")))
    monkeypatch.setattr(mpiexec.sysconfig, "get_path", lambda name: None)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "beside" / "python"))
    monkeypatch.setattr(mpiexec, "library_flavour", lambda: library)
    assert mpiexec.find_mpiexec() == found[chosen]
    assert mpiexec.find_mpiexec(found["path"].path) == found["path"]


def test_mpiexec_of_the_library_where_two_mpis_share_a_folder(monkeypatch, tmp_path):
    """The wheels of both in one environment: the second one has overwritten the first one's ``mpiexec``."""
    fake_mpiexec(tmp_path, "mpiexec (Open MPI) 5.0.11")
    hydra = fake_mpiexec(tmp_path, "HYDRA build details", "mpiexec.hydra")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(mpiexec, "library_flavour", lambda: "MPICH")
    assert mpiexec.find_mpiexec() == Mpiexec(hydra, "MPICH")


def test_mpiexec_beside_the_library_that_mpi4py_was_told_to_load(monkeypatch, tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libmpi.so.40").touch()
    program = fake_mpiexec(tmp_path / "bin", "mpiexec (Open MPI) 5.0.11")
    monkeypatch.setenv("MPI4PY_LIBMPI", str(tmp_path / "lib" / "libmpi.so.40"))
    assert mpiexec.find_mpiexec() == Mpiexec(program, "Open MPI")


@pytest.mark.parametrize(
    ("names", "variables", "flavour"),
    [
        (["libmpi.so", "libmpi.so.12"], {}, "MPICH"),
        (["libmpi.so.40"], {}, "Open MPI"),
        (["libmpi.40.dylib"], {}, "Open MPI"),
        (["libmpi.so.12"], {"MPI4PY_MPIABI": "openmpi"}, "Open MPI"),
        (["libmpi.so.12"], {"MPI4PY_LIBMPI": "/y/libmpi.so.40"}, "Open MPI"),
        (["libz.so"], {}, None),
    ],
)
def test_library_flavour(tmp_path, names, variables, flavour):
    (tmp_path / "lib").mkdir()
    for name in names:
        (tmp_path / "lib" / name).touch()
    assert mpiexec.library_flavour(variables, str(tmp_path)) == flavour


def test_mismatch_is_one_line(monkeypatch):
    monkeypatch.setenv("MPI4PY_MPIABI", "openmpi")
    message = mpiexec.mismatch(Mpiexec("/x/mpiexec", "MPICH"))
    assert message and "\n" not in message and "Open MPI" in message
    assert mpiexec.mismatch(Mpiexec("/x/mpiexec", "Open MPI")) is None


def test_environment():
    built = mpiexec.build_environment(timeout=2.5, base={"MKL_NUM_THREADS": "7"})
    assert built["RINGATTN_TIMEOUT"] == "2.5" and built["RINGATTN_LAUNCH"] == "1" and "OMP_NUM_THREADS" not in built
    built = mpiexec.build_environment(threads=3, base={"OMP_NUM_THREADS": "5", "RINGATTN_THREADS": "5"})
    assert (built["OMP_NUM_THREADS"], built["RINGATTN_THREADS"], built["MKL_NUM_THREADS"]) == ("5", "3", "3")


@pytest.mark.parametrize(("given", "value"), [({}, "0"), ({"MLX_ENABLE_TF32": "1"}, "1")])
def test_ranks_multiply_in_full_float32_unless_the_user_has_chosen(given, value):
    assert mpiexec.build_environment(base=given)["MLX_ENABLE_TF32"] == value


@pytest.mark.parametrize(("local", "share"), [("4", "2"), ("40", "1"), ("", "10")])
def test_a_wrapper_shares_out_the_cores_of_its_host(monkeypatch, tmp_path, capsys, local, share):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(10), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    monkeypatch.chdir(tmp_path)
    environment = {"MKL_NUM_THREADS": "7", "MPI_LOCALNRANKS": local, "RINGATTN_LAUNCH_CWD": "/no/such/folder"}
    prepare_host(environment)
    assert environment["OMP_NUM_THREADS"] == environment["RINGATTN_THREADS"] == share
    assert environment["MKL_NUM_THREADS"] == "7"
    assert os.getcwd() == os.path.realpath(os.path.expanduser("~"))
    assert "cannot go to /no/such/folder (No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "status", "line"),
    [
        (-9, b'{"rank": 2, "call": "x", "hop": 3}', "rank 2 (mac) was killed by SIGKILL in x, hop 3"),
        (
            -11,
            b'{"rank": 2, "size": 4, "call": "", "hop": 0}',
            "rank 2 (mac) was killed by SIGSEGV before its first call",
        ),
        (7, b'{"rank": 2, "call": "after barrier", "hop": 0}', "rank 2 (mac) exited with code 7 after barrier"),
        (-9, b"", "rank 5 (mac) was killed by SIGKILL"),
        (-9, b"\xff=\x01 junk", "rank 5 (mac) was killed by SIGKILL"),
        (-9, b"[1]", "rank 5 (mac) was killed by SIGKILL"),
    ],
)
def test_describes_an_end(code, status, line):
    assert str(Cause.of_end("5", "mac", code, parse_status(status.ljust(4096, b"\0")))) == line


@pytest.mark.parametrize("platform", ["linux", "darwin"])  # /proc, and ps
def test_start_time(monkeypatch, platform):
    if platform == "linux" and sys.platform != "linux":
        pytest.skip("this machine has no /proc")
    monkeypatch.setattr(sys, "platform", platform)
    assert start_time(os.getpid()) == start_time(os.getpid()) != start_time(1) is not None
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert start_time(process.pid) is None  # a zombie
    process.wait()
    assert start_time(process.pid) is None


# The command's own errors


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
    shown = subprocess.run([sys.executable, "-c", code], env=_environment(), capture_output=True, text=True, check=True)
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


# Real runs


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
    found = sorted((seen + out).replace("\n[0] name? hello Ada", "").splitlines())
    assert found == lines and sorted(err.splitlines()) == ["[0] err", "[1] err"], seen + out


@pytest.mark.ranks
def test_mpi4py_works_under_the_wrapper(script):
    path = script(
        "from mpi4py import MPI\ncomm = MPI.COMM_WORLD\ntotal = comm.allreduce(comm.rank + 1)\n"
        "if comm.rank == 1: print(comm.size, total)\n"
    )
    result = launch("-n", "3", path)
    assert (result.returncode, result.stdout) == (0, "3 6\n"), result.stderr


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
