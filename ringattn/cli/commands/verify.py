"""``ringattn verify``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ... import backends
from ...cpu.flash import instruction_sets
from ...metal import launch
from ...native import tf32
from ...reporting.machine import machine
from ...verify.feature_checks import ring_findings, verify_local
from ...verify.findings import Findings, Results, format_results
from ..host_options import ranks_option
from ..trace_option import trace_option

if TYPE_CHECKING:
    from ...verify.variants import Variant


@click.command()
@ranks_option("Local ranks; 0: no ring.", least=0, default=2)
@trace_option()
def verify(ranks: int) -> None:
    """Check every feature on this machine's kernels and ranks against float64, and every variant of the Metal kernels.

    Each cell is the largest error as a fraction of the allowed error, which is twice the error of the plain formula in
    the same dtype plus a few units in the last place. A Metal kernel that was replaced by plain operations has failed.
    The exit status is 1 if anything failed.
    """
    metal = _check_variants()
    click.echo("checking the kernels of this machine ...", err=True)
    local = verify_local()
    ring, problem = _check_ring(ranks)
    click.echo(format_results([local.table, ring.table]))
    failed = {**metal.failed, **local.failed, **ring.failed}
    click.echo(_report(ranks, metal.table, failed, problem))
    raise SystemExit(1 if failed or problem else 0)


def _check_variants() -> Findings:
    """Check every variant of the Metal kernels and print the results, on machines that have these kernels."""
    if "metal" not in backends.available():
        return Findings()
    from ...verify.variants import verify_variants

    last = ""

    def progress(variant: Variant) -> None:  # print each: if the driver ends this process, the last one is the cause
        nonlocal last
        new_line = "\n" * bool(last) + f"checking the Metal kernels in {variant.dtype}: "
        click.echo(f"{'; ' if variant.dtype == last else new_line}{variant.what}", err=True, nl=False)
        last = variant.dtype

    findings = verify_variants(progress)
    click.echo(err=True)
    click.echo(f"{format_results([findings.table], 'Metal kernels')}\n")
    return findings


def _check_ring(ranks: int) -> tuple[Findings, str | None]:
    """Findings on a ring of local ranks, and the problem that kept the ring from running."""
    if not ranks:
        return Findings(), None
    click.echo(f"checking a ring of {ranks} local ranks ...", err=True)
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        line = ["launch", "-n", str(ranks), "--", sys.executable, "-m", "ringattn.verify.feature_checks", str(results)]
        done = subprocess.run([sys.executable, "-m", "ringattn.cli", *line], capture_output=True, text=True)
        if done.returncode or not results.exists():
            return Findings(), (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"
        findings = ring_findings(json.loads(results.read_text()))
    for i, warning in enumerate(dict.fromkeys(re.findall(r"KernelWarning: (.*)", done.stderr)), 1):
        findings.failed[f"kernel {i} of the ring"] = warning
    return findings, None


def _report(ranks: int, metal: Results, failed: dict[str, str], problem: str | None) -> str:
    """Text for a bug report."""
    lines = ["", "--- to paste into a report ---", machine()]
    lines.append(f"CPU kernel: {(instruction_sets() or ['NumPy (not compiled at installation)'])[-1]}")
    lines.append(f"float32 products of MLX: {tf32.describe()}")
    lines.append(f"ring: {ranks} local ranks" if ranks and problem is None else "ring: not checked")
    if problem:
        lines.append(f"the ring did not run: {problem}")
    lines.append(f"Metal kernels: {_metal_summary(metal)}")
    if not failed:
        return "\n".join([*lines, "the rest is within budget" if problem else "all within budget"])
    lines += [f"{name}: {what}" for name, what in failed.items()]
    return "\n".join([*lines, f"FAILED: {'; '.join(failed)}"])


def _metal_summary(metal: Results) -> str:
    if not metal:
        return "not run here (no Apple GPU)"
    units = "with" if launch.tensor_ops() else "without"
    return f"{sum(map(len, metal.values()))} variants run, {units} the M5's matrix units"
