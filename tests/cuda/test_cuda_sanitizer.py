"""Tests of the program that runs the kernels under compute-sanitizer, without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner

from ringattn.cuda import launch
from tools.nvidia import sanitizer
from tools.nvidia.kernels import GRADIENTS, RESULTS, zeros
from tools.nvidia.sanitizer import DONE, Job

JOB = Job("a kernel", "racecheck", ("-m", "it"))
PLANTED = Job("a race", "racecheck", ("-c", "it"), planted=True)
OURS = "========= Error: Race reported between Write access at custom_kernel_ringattn_x and Read access"
OTHER = "========= Error: Race reported between Write access at cublas and Read access"


@pytest.mark.parametrize(
    ("job", "lines", "right"),
    [
        (JOB, [DONE], True),
        (JOB, [OTHER, DONE], True),
        (JOB, [OURS, DONE], False),
        (JOB, ["a line that names ringattn", DONE], True),
        (JOB, ["Traceback"], False),
        (JOB, ["all checks passed"], True),
        (PLANTED, [OURS], True),
        (PLANTED, [DONE], False),
    ],
)
def test_verdicts(job: Job, lines: list[str], right: bool) -> None:
    assert job.verdict(lines)[0] == right


def test_a_verdict_shows_the_first_reports() -> None:
    reports = [OURS.replace("ringattn_x", f"ringattn_{i}") for i in range(9)]
    lines = JOB.verdict([*reports, *reports, DONE])[1].splitlines()
    assert lines[0] == "18 reports" and len(lines) == 1 + sanitizer.SHOWN
    assert "custom_kernel_ringattn_0" in lines[1] and "custom_kernel_ringattn_1" in lines[2]


def test_jobs() -> None:
    """Every variant under both checkers, on each architecture."""
    found = list(sanitizer.jobs(["memcheck", "racecheck"], ["sm_90a", "sm_80"], ""))
    assert len(found) == 1 + 2 * 2 * len(RESULTS | GRADIENTS)
    assert {(job.checker, job.program[-1]) for job in found[1:]} == {("memcheck", "1"), ("racecheck", "32")}
    assert found[0].planted and not any(job.planted for job in found[1:])
    assert "--racecheck-report" in found[-1].command("tool") and found[1].command("tool")[:3] == [
        "tool",
        "--tool",
        "memcheck",
    ]


@pytest.mark.parametrize("variant", ["bfloat16, 128, a state", "gradient, bfloat16, 128, sums"])
def test_a_variant_runs_its_kernels(monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """All of its kernels, and no others."""
    ran = []

    def executor(call: launch.KernelCall) -> list[mx.array]:
        ran.append(call.name)
        return zeros(call)

    monkeypatch.setattr(launch.launcher, "gpu", executor)
    monkeypatch.setattr(launch.launcher, "executor", executor)
    sanitizer.run_variant("sm_90a", variant)
    assert ran and all("hopper" in name or "rows" in name or "collect" in name for name in ran)


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a checker that reports nothing, only the planted race, which it does not see, is wrong."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!{sys.executable}\nprint({DONE!r})\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(sanitizer, "capability", lambda: (8, 0))
    done = CliRunner().invoke(sanitizer.main, ["-k", "causal, a state"])
    assert done.exit_code == 1 and done.output.splitlines()[-1] == "FAILED: 1 of 3", done.output
    done = CliRunner().invoke(sanitizer.main, ["-k", "a state", "--checker", "memcheck"])
    assert done.exit_code == 0 and "ok    memcheck   sm_80, bfloat16, 128, a state" in done.output
