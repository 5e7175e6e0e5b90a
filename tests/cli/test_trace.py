"""Option ``--trace``: its checks, and the files that commands write."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_model import make_folder

from ringattn.cli import COMMANDS, main
from ringattn.tracing.files import VARIABLE

RINGS = ("chat", "demo", "generate", "launch", "serve", "verify")


def invoke(*line: str):
    return CliRunner().invoke(main, list(line))


@pytest.mark.parametrize("command", RINGS)
def test_commands_that_run_a_ring_have_it(command: str) -> None:
    assert command in COMMANDS and "--trace FILE" in invoke(command, "--help").output


@pytest.mark.parametrize(
    ("name", "message"), [("x.txt", "expected a name that ends in .json"), ("none/x.json", "there is no folder")]
)
def test_a_wrong_name_is_one_line(tmp_path: Path, name: str, message: str) -> None:
    done = invoke("verify", "--trace", str(tmp_path / name))
    assert done.exit_code == 2 and message in done.output and done.output.count("\n") == 1


def test_a_picture_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    done = invoke("verify", "--trace", str(tmp_path / "x.png"))
    assert done.exit_code == 1 and "pip install 'ringattn[plot]'" in done.output


def test_the_variable_is_set_for_the_command_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    files = [str(tmp_path / name) for name in ("a.json", "b.svg")]
    done = invoke("launch", "-n", "1", "--trace", files[0], "--trace", files[1], "--dry-run", "--", sys.executable)
    assert f"{VARIABLE}={os.pathsep.join(files)}" in done.output
    assert VARIABLE not in os.environ


def process_names(path: Path) -> list[str]:
    events = json.loads(path.read_text())["traceEvents"]
    return [event["args"]["name"].split(" (")[0] for event in events if event["name"] == "process_name"]


@pytest.mark.ranks
def test_launch_gives_it_to_any_program(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    program = "import ringattn as ra\nwith ra.init() as ring: ring.barrier()"
    done = invoke("launch", "-n", "2", "--trace", str(path), "--", sys.executable, "-c", program)
    assert done.exit_code == 0, done.output
    assert process_names(path) == ["rank 0", "rank 1"]


@pytest.mark.ranks
def test_a_program_without_a_ring_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    done = invoke("launch", "-n", "2", "--trace", str(path), "--", sys.executable, "-c", "")
    assert done.exit_code == 0 and not path.exists()
    assert f"ringattn: trace: {path} was not written: no rank has opened and closed a ring" in done.output


@pytest.mark.ranks
def test_a_broken_ring_leaves_a_file_for_each_rank(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    program = "import ringattn as ra\nring = ra.init()\nring.barrier()\nif ring.rank: 1 / 0\nring.barrier()"
    done = invoke("launch", "-n", "2", "--trace", str(path), "--", sys.executable, "-c", program)
    assert done.exit_code == 1 and "was not written" not in done.output, done.output
    assert sorted(found.name for found in tmp_path.iterdir()) == ["trace.rank0.json", "trace.rank1.json"]


@pytest.mark.ranks
@pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is None, reason="not installed: mlx_lm")
def test_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.json"
    model = make_folder(tmp_path)
    line = ("generate", "-n", "2", "--model", str(model), "--prompt", "abc" * 200, "-m", "3", "--trace", str(path))
    monkeypatch.setattr(sys, "argv", ["ringattn", *line])  # the command runs itself again on the ranks
    done = invoke(*line)
    assert done.exit_code == 0, done.output
    assert process_names(path) == ["rank 0", "rank 1"]
    names = {event["name"] for event in json.loads(path.read_text())["traceEvents"]}
    assert "decode_attention" in names and any(name.startswith("ring_attention pass_") for name in names), names
