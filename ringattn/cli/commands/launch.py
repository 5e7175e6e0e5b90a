"""``ringattn launch``."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import Any

import click

from .. import leave
from ..host_options import HOSTS, PROCESSES, ranks_option, with_options
from ..starting import Place, prepare


@click.command(context_settings={"allow_interspersed_args": False})
@with_options(
    ranks_option("Ranks (processes) to start.  [default: one for each slot of the hosts]"), *HOSTS, *PROCESSES
)
@click.option(
    "--prefix/--no-prefix", default=None, help="Put the rank before each line of output.  [default: with hosts]"
)
@click.option("--dry-run", is_flag=True, help="Print the command line and run nothing.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="[--] COMMAND...")
def launch(prefix: bool | None, dry_run: bool, command: tuple[str, ...], **options: Any) -> None:
    """Run COMMAND on N ranks, on this machine or on several hosts.

    COMMAND is any program with its arguments; a script that ends in .py, and ringattn, run under this Python. Options
    of COMMAND go behind it. Rank 0 gets the standard input. When a rank fails, the others are ended and the exit code
    is that of the first that failed. Ctrl-C ends all of them, twice at once.

    Hosts are reached by ssh without a password, and have Python, ringattn and MPI at the same paths as this machine.
    """
    ranks = prepare(Place.taken_from(options), command, prefix=prefix, dry_run=dry_run)
    if dry_run:
        click.echo(shlex.join([*_changed(ranks.environment), *ranks.line]))
        return
    leave(ranks.run())


def _changed(environment: Mapping[str, str]) -> list[str]:
    """Assignments of what the ranks' environment has beyond this one, to be put before a command."""
    changed = [f"{name}={value}" for name, value in environment.items() if os.environ.get(name) != value]
    return ["env", *sorted(changed)] if changed else []
