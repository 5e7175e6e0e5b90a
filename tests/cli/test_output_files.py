"""Files that a command is to write: what is wrong with them is one line before the work begins."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from ringattn.cli import main
from ringattn.cli.output_files import problem_with, problem_with_folder

MODEL = ("--model", "none.gguf", "-p", "x")
WRITERS = [
    ("bench", "links", "--json", "x.json"),
    ("bench", "ring", "--plot", "x.png"),
    ("demo", "--picture", "x.png"),
    ("generate", *MODEL, "--save-prompt-cache", "x.json"),
    ("generate", *MODEL, "--trace", "x.json"),
    ("plan", "--heads", "8/2", "--machine", "m4", "--json", "x.json"),
    ("verify", "--trace", "x.json"),
]


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder that cannot be written to, also for a user who may write everywhere."""
    access = os.access
    denied = {tmp_path, tmp_path / "there"}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).absolute() not in denied and access(path, mode))
    return tmp_path


@pytest.mark.parametrize("line", WRITERS, ids=" ".join)
def test_a_folder_that_cannot_be_written_to(read_only: Path, line: tuple[str, ...]) -> None:
    done = CliRunner().invoke(main, list(line))
    assert done.exit_code in (1, 2) and done.output.count("\n") == 1, done.output
    assert done.output.startswith("Error: ") and line[-2] in done.output and line[-1] in done.output
    assert "the folder . cannot be written to" in done.output


def test_a_file_that_is_there(read_only: Path) -> None:
    assert problem_with(Path("there")) == "the file cannot be written to"
    assert problem_with(Path("/dev/stdout")) is None
    assert problem_with_folder(Path("/no/such/x.json")) == "there is no folder /no/such"
