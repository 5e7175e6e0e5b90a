"""``ringattn launch``."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ...tracing.files import VARIABLE, split_names
from .. import leave
from ..host_options import HOSTS, PROCESSES, ranks_option, with_options
from ..starting import Placement, prepare
from ..trace_option import trace_option


@click.command(context_settings={"allow_interspersed_args": False})
@with_options(
    ranks_option("Ranks (processes) to start.  [default: one for each slot of the hosts]"), *HOSTS, *PROCESSES
)
@click.option(
    "--prefix/--no-prefix", default=None, help="Put the rank before each line of output.  [default: with hosts]"
)
@trace_option()
@click.option("--dry-run", is_flag=True, help="Print the command line and run nothing.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="[--] COMMAND...")
def launch(prefix: bool | None, dry_run: bool, command: tuple[str, ...], **options: Any) -> None:
    """Run COMMAND on N ranks, on this machine or on several hosts.

    COMMAND is any program with its arguments. Scripts that end in .py, and ringattn, run under this Python. Write the
    options of COMMAND after it. Rank 0 gets the standard input. When a rank fails, all others are ended, and the exit
    code is that of the first rank that failed. Ctrl-C ends all ranks; a second Ctrl-C ends them at once.

    ssh must reach the hosts without a password. They need Python, ringattn and MPI at the same paths as this machine.
    """
    placement = Placement.pop_from(options)
    trace = split_names(os.environ.get(VARIABLE, ""))
    ranks = prepare(placement, command, prefix=prefix, dry_run=dry_run)
    if dry_run:
        click.echo(shlex.join([*_changed(ranks.environment), *ranks.line]))
        return
    here = [] if placement.hosts or placement.hostfile else [(path, _written(path)) for path in trace]
    code = ranks.run()
    for path, before in here:
        if code == 0 and _written(path) == before:
            click.echo(f"ringattn: trace: {path} was not written: no rank has opened and closed a ring", err=True)
    leave(code)


def _written(path: Path) -> int:
    """Time in ns at which a file was written; 0 where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _changed(environment: Mapping[str, str]) -> list[str]:
    """Command prefix that sets the variables in which the ranks' environment differs from the user's."""
    own = {name: value for name, value in os.environ.items() if name != VARIABLE}  # an option has set that one
    changed = [f"{name}={value}" for name, value in environment.items() if own.get(name) != value]
    return ["env", *sorted(changed)] if changed else []
