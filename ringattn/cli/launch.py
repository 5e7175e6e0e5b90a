"""``ringattn launch``."""

from __future__ import annotations

import shlex

import click

from ..cluster.local import run_local
from ..cluster.mpiexec import (
    LaunchError,
    build_command,
    build_environment,
    check_command,
    find_mpiexec,
    mismatch,
)


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("-n", "ranks", required=True, type=click.IntRange(min=1), metavar="N", help="Ranks (processes) to start.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="S",
    help="Seconds without a sign of life after which a rank counts as dead.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="T",
    help="Threads per rank.  [default: the cores of this machine divided by N]",
)
@click.option("--mpiexec", metavar="PATH", help="The mpiexec to use.  [default: the one beside this Python, then PATH]")
@click.option("--dry-run", is_flag=True, help="Print the command line and run nothing.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="[--] COMMAND...")
def launch(
    ranks: int, timeout: float | None, threads: int | None, mpiexec: str | None, dry_run: bool, command: tuple[str, ...]
) -> None:
    """Run COMMAND on N ranks of this machine.

    COMMAND is any program with its arguments; a script that ends in .py runs under this Python. Options of COMMAND go
    behind it. When a rank fails, the others are ended and the exit code is that of the first that failed. Ctrl-C ends
    all of them, twice at once.
    """
    try:
        found = find_mpiexec(mpiexec)
        line = build_command(found, ranks, command)
        if dry_run:
            click.echo(shlex.join(line))
            return
        check_command(command)
    except LaunchError as error:
        click.echo(f"Error: {error}", err=True)
        raise SystemExit(error.exit_code) from None
    if warning := mismatch(found):
        click.echo(f"Warning: {warning}", err=True)
    environment = build_environment(ranks, threads=threads, timeout=timeout)
    raise SystemExit(run_local(line, ranks=ranks, environment=environment))
