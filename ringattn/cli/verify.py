"""``ringattn verify``."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import click

from .. import backends
from ..backends.softmax import compiled
from ..verify.run import Results, failures, verify_local


@click.command()
@click.option("--ranks", default=2, show_default=True, type=click.IntRange(min=0), help="Local ranks; 0: no ring.")
def verify(ranks: int) -> None:
    """Check every feature on this machine's kernels and ranks against float64, and every variant of the Metal kernels.

    Each cell is the largest error as a fraction of what is allowed: twice the error of the plain formula in the same
    dtype, and a few units in the last place. The exit status is 1 if anything is over 1.
    """
    variants = _variants()
    click.echo("checking the kernels of this machine ...", err=True)
    tables = [verify_local(lambda name: None)]
    problem = None
    if ranks:
        click.echo(f"checking a ring of {ranks} local ranks ...", err=True)
        table, problem = _ring(ranks)
        tables += [table] if table else []
    failed = [name for name, found in variants.items() if isinstance(found, str) or not found <= 1] + failures(tables)
    for name, found in variants.items():
        click.echo(f"metal: {name}: {found if isinstance(found, str) else _cell(found)}")
    click.echo(_table(tables))
    click.echo(_report(ranks, failed, problem))
    raise SystemExit(1 if failed or problem else 0)


def _variants() -> dict[str, float | str]:
    """What became of every variant of the Metal kernels, where there are any."""
    if "metal" not in backends.available():
        click.echo("Metal kernels: not run here (no Apple GPU)", err=True)
        return {}
    from ..verify.variants import verify_variants

    return verify_variants(lambda name: click.echo(f"checking the Metal kernels: {name} ...", err=True))


def _ring(ranks: int) -> tuple[Results | None, str | None]:
    """The results of a ring of local ranks, or what kept it from running."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        line = ["launch", "-n", str(ranks), "--", sys.executable, "-m", "ringattn.verify.run", str(results)]
        done = subprocess.run([sys.executable, "-m", "ringattn.cli", *line], capture_output=True, text=True)
        if done.returncode or not results.exists():
            return None, (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"
        return json.loads(results.read_text()), None


def _table(tables: list[Results]) -> str:
    columns = [key for table in tables for key in next(iter(table.values()))]
    names = list(tables[0])
    width = max(map(len, names))
    lines = [" " * width + "".join(f"{column:>11}" for column in columns)]
    for name in names:
        cells = [value for table in tables for value in table[name].values()]
        lines.append(f"{name:<{width}}" + "".join(f"{_cell(value):>11}" for value in cells))
    return "\n".join(lines)


def _cell(fraction: float) -> str:
    return f"{fraction:.2f}" if fraction <= 1 else f"FAIL {fraction:.1f}"


def _report(ranks: int, failed: list[str], problem: str | None) -> str:
    """One block for a bug report."""
    lines = ["", "--- to paste into a report ---", machine()]
    lines.append(f"softmax of the CPU kernel: {'compiled' if compiled() else 'NumPy (not compiled at installation)'}")
    lines.append(f"ring: {ranks} local ranks" if ranks and problem is None else "ring: not checked")
    if problem:
        lines.append(f"the ring did not run: {problem}")
    if "metal" not in backends.available():
        lines.append("Metal kernels: not run here")
    lines.append(f"FAILED: {'; '.join(failed)}" if failed else "all within budget")
    return "\n".join(lines)


def machine() -> str:
    """Versions and device, for reports."""
    versions = ", ".join(f"{name} {_version(name)}" for name in ("ringattn", "mlx", "numpy", "mpi4py"))
    return f"{versions}\nPython {platform.python_version()}, {platform.platform()}, {_device()}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _device() -> str:
    import mlx.core as mx

    if not mx.metal.is_available():
        return f"MLX on {mx.default_device().type}"
    info = mx.device_info()
    return f"{info['device_name']}, {int(info['memory_size']) >> 30} GiB"
