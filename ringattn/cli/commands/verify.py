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
from ...cpu.softmax import compiled
from ...metal import launch
from ...native import tf32
from ...reporting.machine import machine
from ...verify.findings import Findings, Results
from ...verify.run import findings, verify_local
from ..host_options import ranks_option

if TYPE_CHECKING:
    from ...verify.variants import Variant


@click.command()
@ranks_option("Local ranks; 0: no ring.", least=0, default=2)
def verify(ranks: int) -> None:
    """Check every feature on this machine's kernels and ranks against float64, and every variant of the Metal kernels.

    Each cell is the largest error as a fraction of what is allowed: twice the error of the plain formula in the same
    dtype, and a few units in the last place. A Metal kernel that plain operations had to take the place of has failed.
    The exit status is 1 if anything failed.
    """
    metal = _variants()
    click.echo("checking the kernels of this machine ...", err=True)
    local = verify_local()
    ring, problem = _ring(ranks)
    click.echo(_table([local.table, ring.table]))
    failed = {**metal.failed, **local.failed, **ring.failed}
    click.echo(_report(ranks, metal.table, failed, problem))
    raise SystemExit(1 if failed or problem else 0)


def _variants() -> Findings:
    """Try and print every variant of the Metal kernels, where there are any."""
    if "metal" not in backends.available():
        return Findings()
    from ...verify.variants import verify_variants

    last = ""

    def progress(variant: Variant) -> None:  # in full: should the driver end this process, the last one is to blame
        nonlocal last
        new_line = "\n" * bool(last) + f"checking the Metal kernels in {variant.dtype}: "
        click.echo(f"{'; ' if variant.dtype == last else new_line}{variant.what}", err=True, nl=False)
        last = variant.dtype

    found = verify_variants(progress)
    click.echo(err=True)
    click.echo(f"{_table([found.table], 'Metal kernels')}\n")
    return found


def _ring(ranks: int) -> tuple[Findings, str | None]:
    """What a ring of local ranks found, and what kept it from running."""
    if not ranks:
        return Findings(), None
    click.echo(f"checking a ring of {ranks} local ranks ...", err=True)
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        line = ["launch", "-n", str(ranks), "--", sys.executable, "-m", "ringattn.verify.run", str(results)]
        done = subprocess.run([sys.executable, "-m", "ringattn.cli", *line], capture_output=True, text=True)
        if done.returncode or not results.exists():
            return Findings(), (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"
        found = findings(json.loads(results.read_text()))
    for i, warning in enumerate(dict.fromkeys(re.findall(r"KernelWarning: (.*)", done.stderr)), 1):
        found.failed[f"kernel {i} of the ring"] = warning
    return found, None


def _table(tables: list[Results], title: str = "") -> str:
    tables = [table for table in tables if table]
    columns = [(table, key) for table in tables for key in dict.fromkeys(key for row in table.values() for key in row)]
    names = list(dict.fromkeys(name for table in tables for name in table))
    width = max(map(len, [title, *names]))
    lines = [f"{title:<{width}}" + "".join(f"{column:>11}" for _, column in columns)]
    for name in names:
        cells = [_cell(table.get(name, {}).get(column)) for table, column in columns]
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def _cell(fraction: float | None) -> str:
    if fraction is None:
        return ""
    if fraction <= 1:
        return f"{fraction:.2f}"
    return f"FAIL {fraction:.4g}" if fraction < 1e4 else "FAIL"


def _report(ranks: int, metal: Results, failed: dict[str, str], problem: str | None) -> str:
    """One block for a bug report."""
    lines = ["", "--- to paste into a report ---", machine()]
    lines.append(f"softmax of the CPU kernel: {'compiled' if compiled() else 'NumPy (not compiled at installation)'}")
    lines.append(f"float32 products of MLX: {tf32.describe()}")
    lines.append(f"ring: {ranks} local ranks" if ranks and problem is None else "ring: not checked")
    if problem:
        lines.append(f"the ring did not run: {problem}")
    lines.append(f"Metal kernels: {_how(metal)}")
    if not failed:
        return "\n".join([*lines, "the rest is within budget" if problem else "all within budget"])
    lines += [f"{name}: {what}" for name, what in failed.items()]
    return "\n".join([*lines, f"FAILED: {'; '.join(failed)}"])


def _how(metal: Results) -> str:
    if not metal:
        return "not run here (no Apple GPU)"
    units = "with" if launch.tensor_ops() else "without"
    return f"{sum(map(len, metal.values()))} variants run, {units} the M5's matrix units"
