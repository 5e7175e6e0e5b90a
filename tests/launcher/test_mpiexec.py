"""Tests of the command lines of mpiexec, of the environment of ranks, and of how an end is described."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from launching import environment, launch

from ringattn.cli import main
from ringattn.errors import LaunchError
from ringattn.launcher import mpiexec
from ringattn.launcher.mpiexec import Mpiexec
from ringattn.launcher.processes import start_time
from ringattn.launcher.rank_status import parse_status
from ringattn.launcher.rank_wrapper import choose_gpu, gpu_count, prepare_host, unescape
from ringattn.transport.failures.cause import Cause


@pytest.mark.ranks
@pytest.mark.parametrize("code", [0, 5])
def test_dry_run_prints_a_line_that_runs(script, code):
    """Of mpiexec alone, with nobody to report to; a rank that fails is then MPI's affair."""
    told = "f\"{rank} {sys.argv[1:]} {os.environ['RINGATTN_THREADS']}\\n\""  # in one piece, lest ranks' pieces mix
    path = script(f"sys.stdout.write({told})\nsys.exit(int(sys.argv[2]))")
    printed = launch("-n", "2", "--threads", "3", "--dry-run", path, "a b", str(code), ":").stdout
    done = subprocess.run(["sh", "-c", printed], capture_output=True, text=True, timeout=30, env=environment())
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
    ("given", "place", "count", "chosen"),
    [
        (None, {"MPI_LOCALRANKID": "2"}, 4, "2"),
        (None, {"OMPI_COMM_WORLD_LOCAL_RANK": "5"}, 4, "1"),
        (None, {"MPI_LOCALRANKID": "2"}, 1, None),
        (None, {}, 0, None),
        ("4, 6", {"MPI_LOCALRANKID": "1"}, 8, "6"),
        ("7", {"MPI_LOCALRANKID": "1"}, 8, "7"),
        ("", {"MPI_LOCALRANKID": "1"}, 8, ""),
    ],
)
def test_a_wrapper_gives_each_rank_a_gpu(given, place, count, chosen):
    environment = dict(place) if given is None else {**place, "CUDA_VISIBLE_DEVICES": given}
    choose_gpu(environment, count)
    assert environment.get("CUDA_VISIBLE_DEVICES") == chosen


def test_gpus_are_counted_without_their_library(tmp_path):
    assert gpu_count(str(tmp_path / "gpus")) == 0
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    assert gpu_count(str(tmp_path / "gpus")) == 1


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
