"""``ringattn bench`` on rings: the commands themselves, their files, and their errors."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from spawn import ROOT
from tiny_model import make_folder

from ringattn.bench.records import Record, load, save
from ringattn.cli import main

SMALL = ("--tokens", "64", "--head-dim", "16", "--heads", "2/1", "--repeats", "1")


def run(*line: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "ringattn.cli", "bench", *line]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("line", "rows"),
    [
        (("ring", *SMALL, "--layout", "zigzag,cyclic", "--strategy", "pass_kv,pass_q"), 8),
        (("train", *SMALL, "--causal"), 1),
        (("decode", *SMALL), 1),
        (("links", "--bytes", "1000,5000", "--repeats", "2"), 3),
    ],
)
def test_a_benchmark_of_a_ring(line: tuple[str, ...], rows: int, tmp_path: Path) -> None:
    file, picture, trace = (tmp_path / name for name in ("x.json", "x.png", "trace.json"))
    done = run(*line, "-n", "2", "--json", str(file), "--plot", str(picture), "--trace", str(trace))
    assert done.returncode == 0, done.stdout + done.stderr
    records = load(file)
    assert len(records) == rows and {record.case["ranks"] for record in records} == {2}
    table = done.stdout.split("\n\n")[0].splitlines()
    assert len(table) == rows + 1 and "2 ranks over 'mpi' on 1 host(s)" in done.stdout
    about = json.loads(file.read_text())
    assert about["command"].startswith(f"ringattn bench {line[0]}") and "mlx" in about["machine"]
    assert picture.exists() and {e["pid"] for e in json.loads(trace.read_text())["traceEvents"]} == {0, 1}


def test_one_rank_and_a_comparison(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    line = ("ring", *SMALL, "-n", "1", "--causal")
    assert run(*line, "--json", str(file)).returncode == 0
    (old,) = load(file)
    save(file, [Record(old.bench, old.case, [1000.0, 1000.0])], {})
    done = run(*line, "--compare", str(file))
    assert done.returncode == 0 and done.stdout.rstrip().splitlines()[-1].endswith("faster"), done.stdout + done.stderr
    save(file, [Record("links", old.case, [1.0])], {})
    done = run(*line, "--compare", str(file))
    assert f"--compare: {file} has none of these cases" in done.stdout and "nan" not in done.stdout, done.stdout


@pytest.mark.ranks
@pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is None, reason="not installed: mlx_lm")
def test_a_model(tmp_path: Path) -> None:
    model = make_folder(tmp_path)
    line = ("--prompt-tokens", "20,50", "--check-tokens", "30", "--new-tokens", "3", "--repeats", "2")
    file = tmp_path / "x.json"
    done = run("generate", "-n", "2", "--model", str(model), *line, "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    records = load(file)
    assert [record.case["prompt"] for record in records] == [20, 50]
    assert all(len(record.seconds) == 2 and record.figures["token_s"] > 0 for record in records)


@pytest.mark.ranks
@pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is None, reason="not installed: mlx_lm")
def test_a_model_that_only_one_rank_has(tmp_path: Path) -> None:
    """All ranks end, with the error of the one that lacks it."""
    model = make_folder(tmp_path)
    code = f"""
import os, sys
import ringattn.cli.lm_command as command
from ringattn.cli import main
load = command.load_named
rank = os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK"))
command.load_named = lambda path, dtype: load("/no/such/model" if rank == "1" else path, dtype)
main(["bench", "generate", "--model", {str(model)!r}])
"""
    line = [sys.executable, "-m", "ringattn.cli", "launch", "-n", "2", "--", sys.executable, "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode and "--model: /no/such/model: no such folder" in done.stderr, done.stdout + done.stderr


@pytest.mark.ranks
def test_growth(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    line = ("growth", "-n", "2", "--tokens", "64,128", "--head-dim", "16", "--repeats", "1", "--json", str(file))
    done = run(*line)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(r.case["ranks"], r.case["tokens"]) for r in load(file)] == [(1, 64), (1, 128), (2, 64), (2, 128)]
    assert "bytes sent against tokens, 2 ranks" in done.stdout and "theory" in done.stdout
    first = load(file)
    assert [len(one.seconds) for one in first] == [2, 1, 2, 1]  # shorter calls are timed more often
    done = run(*line[:4], "64,128,256", *line[5:], "--continue")
    assert done.returncode == 0, done.stdout + done.stderr
    again = load(file)
    assert [one for one in again if one.case["tokens"] < 256] == first
    assert [one.case["ranks"] for one in again if one.case["tokens"] == 256] == [1, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("ring", "--layout", "spiral"), "'spiral', expected some of zigzag, contiguous, cyclic"),
        (("ring", "--strategy", "best"), "'best', expected some of auto, pass_kv"),
        (("ring", "--plot", "x.pdf"), "'x.pdf', expected a name that ends in .png or .svg"),
        (
            ("ring", "--compare", "/no/such/file"),
            "--compare: /no/such/file: No such file or directory, expected",
        ),
        (("ring", "--compare", __file__), "test_bench_ring.py: it has another form, expected a file that ringattn"),
        (("ring", "--json", "/no/such/folder/x.json"), "--json: /no/such/folder/x.json: there is no folder"),
        (("ring", "--interface", "en0"), "without hosts"),
        (("links", "--bytes", "0"), "'0', expected numbers of at least 1"),
        (("links", "-n", "1"), "-n: 1, expected at least 2 ranks"),
        (("growth", "-n", "0"), "-n"),
        (("growth", "--continue"), "--continue: only with --json"),
    ],
)
def test_a_wrong_option_is_one_line(line: tuple[str, ...], message: str) -> None:
    done = CliRunner().invoke(main, ["bench", *line])
    assert done.exit_code in (1, 2) and message in done.output and done.output.count("\n") == 1, done.output
