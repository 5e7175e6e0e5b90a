"""Run the kernels under compute-sanitizer on an NVIDIA GPU: ``python -m tools.nvidia.sanitizer``.

Each variant of `tools.nvidia.kernels` runs in a process of its own, on few tokens, under the memory and the race
checker: on a Hopper GPU the kernels by ``wgmma``, and on every GPU those by ``mma.sync``. The race checker sees shared
memory alone. ``--kernels metal`` runs the small problems of ``tools.nvidia.check`` with the Metal kernels instead.
"""

from __future__ import annotations

import os

os.environ["MLX_ENABLE_TF32"] = "0"  # before MLX is imported: float32 products in float32

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from unittest import mock

import click
import mlx.core as mx

from ringattn.cuda import hopper_tiling, launch
from ringattn.cuda.device import HOPPER, capability

from .kernels import GRADIENTS, RESULTS, results_of

CHECKERS = {"memcheck": (), "racecheck": ("--racecheck-report", "all")}
SHOWN = 6  # different reports of a job
DONE = "the program has ended"  # its last line; without it there is no verdict
PLANTED = """
import mlx.core as mx
source = "__shared__ float s[64]; int t = threadIdx.x; s[t] = x[t]; y[t] = s[63 - t];"
kernel = mx.fast.cuda_kernel(name="ringattn_planted", input_names=["x"], output_names=["y"], source=source)
call = {"template": [], "grid": (64, 1, 1), "threadgroup": (64, 1, 1)}
mx.eval(kernel(inputs=[mx.ones(64)], output_shapes=[(64,)], output_dtypes=[mx.float32], **call))
"""


@dataclass(frozen=True)
class Job:
    """A Python program under one checker.

    Attributes:
        name: What it runs.
        checker: One of `CHECKERS`.
        program: Arguments of Python.
        planted: Whether reports are expected.
    """

    name: str
    checker: str
    program: tuple[str, ...]
    planted: bool = False

    def command(self, tool: str) -> list[str]:
        """The command that runs it with the checker at `tool`."""
        return [tool, "--tool", self.checker, *CHECKERS[self.checker], sys.executable, *self.program]

    def verdict(self, lines: Sequence[str]) -> tuple[bool, str]:
        """Whether the lines of the output are right, and why.

        Reports that name no kernel of this project are left out: cuBLAS, which the Metal kernels' check uses, has some.
        """
        reports = [line.strip("= ") for line in lines if line.startswith("=====") and "ringattn" in line]
        count = f"{len(reports)} reports"
        if self.planted:
            return bool(reports), f"{count} of a planted race"
        if DONE not in lines and "all checks passed" not in lines:
            return False, f"did not end: {' '.join(lines)[-300:]}"
        return not reports, "\n".join([count, *(f"      {line}" for line in list(dict.fromkeys(reports))[:SHOWN])])


def jobs(checkers: Sequence[str], architectures: Sequence[str], part: str) -> Iterator[Job]:
    """The jobs of the CUDA kernels of some architectures whose variants contain `part`, the planted race first."""
    if "racecheck" in checkers:
        yield Job("a planted race", "racecheck", ("-c", PLANTED), planted=True)
    for checker, architecture, variant in product(checkers, architectures, RESULTS | GRADIENTS):
        if part in variant:
            lanes = "32" if checker == "racecheck" else "1"
            program = ("-m", "tools.nvidia.sanitizer", "--run", architecture, variant, lanes)
            yield Job(f"{architecture}, {variant}", checker, program)


def metal_jobs(checkers: Sequence[str]) -> Iterator[Job]:
    """The jobs of the Metal kernels."""
    for checker in checkers:
        yield Job("Metal kernels", checker, ("-m", "tools.nvidia.check", "--quick", "--kernels", "metal"))


def run_variant(architecture: str, variant: str, lanes: str = "1") -> None:
    """Run the kernels that a variant has on an architecture, without their trial, which uses other kernels too.

    `lanes` is `hopper_tiling.ARRIVALS`.
    """
    with mock.patch.object(hopper_tiling, "ARRIVALS", int(lanes)):
        mx.eval(results_of(variant, architecture, lambda call: launch.launcher.gpu(call)))  # not the default: not tried
    click.echo(DONE)


def run_job(job: Job, tool: str, limit: float) -> tuple[bool, str]:
    """Run a job for `limit` seconds at most, and return its verdict."""
    try:
        done = subprocess.run(job.command(tool), capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return False, f"did not end in {limit:g} s"
    return job.verdict((done.stdout + done.stderr).splitlines())


def sanitizer() -> str:
    """The path of compute-sanitizer.

    Raises:
        ClickException: If it is not installed.
    """
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(found).exists():
        raise click.ClickException("compute-sanitizer: not on PATH nor in /usr/local/cuda/bin; it comes with CUDA")
    return found


@click.command(help=__doc__)
@click.option("--kernels", type=click.Choice(["cuda", "metal"]), default="cuda", show_default=True)
@click.option("--checker", "checkers", multiple=True, type=click.Choice(list(CHECKERS)), default=tuple(CHECKERS))
@click.option("-k", "part", default="", help="Variants whose name contains this.")
@click.option("--at-once", default=4, show_default=True, type=click.IntRange(1), help="Processes at a time.")
@click.option("--limit", default=300.0, show_default=True, help="Seconds for each.")
@click.option("--run", "one", nargs=3, help="Run an architecture's variant, unchecked: both, and the lanes to arrive.")
def main(kernels: str, checkers: tuple[str, ...], part: str, at_once: int, limit: float, one: tuple | None) -> None:
    if one is not None:
        run_variant(*one)
        return
    tool = sanitizer()
    architectures = ["sm_90a", "sm_80"] if capability() == HOPPER else ["sm_80"]
    every = list(metal_jobs(checkers) if kernels == "metal" else jobs(checkers, architectures, part))
    right = []
    with ThreadPoolExecutor(at_once) as pool:
        for job, (good, what) in zip(every, pool.map(lambda job: run_job(job, tool, limit), every)):
            click.echo(f"{'ok  ' if good else 'FAIL'}  {job.checker:<10} {job.name:<46} {what}")
            right.append(good)
    click.echo("all checks passed" if all(right) else f"FAILED: {right.count(False)} of {len(right)}")
    raise SystemExit(0 if all(right) else 1)


if __name__ == "__main__":
    main()
