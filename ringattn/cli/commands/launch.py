"""``ringattn launch``."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import click

from ...errors import LaunchError
from ...launcher.hostfile import Cluster, check_variable
from ...launcher.mpiexec import build_command, build_environment, check_command, find_mpiexec, mismatch
from ...launcher.preflight import check_hosts, home_address
from ...launcher.supervisor import run as run_ranks
from ..host_options import chosen, count_ranks, host_options

TELLING = ("RINGATTN_", "PYTHON", "MLX_", "MPI4PY_", "FI_", "UCX_", "HF_", "OMP_", "OPENBLAS_", "MKL_", "VECLIB_")
FOR_WRAPPERS = ("RINGATTN_LAUNCHER", "RINGATTN_LAUNCH_DIR")  # what is known only once the launcher runs


@click.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "-n",
    "ranks",
    type=click.IntRange(min=1),
    metavar="N",
    help="Ranks (processes) to start.  [default: one for each slot of the hosts]",
)
@host_options
@click.option(
    "--env", "variables", multiple=True, metavar="NAME[=VALUE]", help="For the ranks' environment; repeatable."
)
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
    help="Threads per rank.  [default: the cores of its host, divided by the ranks there]",
)
@click.option("--mpiexec", metavar="PATH", help="The mpiexec to use.  [default: the one beside this Python, then PATH]")
@click.option(
    "--prefix/--no-prefix", default=None, help="Put the rank before each line of output.  [default: with hosts]"
)
@click.option("--dry-run", is_flag=True, help="Print the command line and run nothing.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="[--] COMMAND...")
def launch(
    ranks: int | None,
    hosts: str | None,
    hostfile: Path | None,
    interface: str | None,
    variables: tuple[str, ...],
    timeout: float | None,
    threads: int | None,
    mpiexec: str | None,
    prefix: bool | None,
    dry_run: bool,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND on N ranks, on this machine or on several hosts.

    COMMAND is any program with its arguments; a script that ends in .py, and ringattn, run under this Python. Options
    of COMMAND go behind it. When a rank fails, the others are ended and the exit code is that of the first that failed.
    Ctrl-C ends all of them, twice at once.

    Hosts are reached by ssh without a password, and have Python, ringattn and MPI at the same paths as this machine.
    """
    try:
        cluster = chosen(hosts, hostfile, interface)
        count = count_ranks(ranks, cluster)
        given = _variables([*(cluster.variables if cluster else ()), *variables])
        remote = cluster is not None
        environment = build_environment(
            threads=threads,
            timeout=timeout,
            interface=interface,
            remote=remote,
            prefix=remote if prefix is None else prefix,
            base={**os.environ, **given},
        )
        found = find_mpiexec(mpiexec)
        if not dry_run:
            check_command(command)
        if cluster is not None and not dry_run:
            check_hosts(cluster.hosts, found, interface)
        line = build_command(
            found,
            count,
            command,
            hosts=cluster.hosts if cluster else (),
            home=home_address(cluster.hosts) if cluster else "",
            interface=interface,
            variables=[*given, *_told(environment), *(() if dry_run else FOR_WRAPPERS)],
        )
    except LaunchError as error:
        click.echo(f"Error: {error}", err=True)
        raise SystemExit(error.exit_code) from None
    warnings = (_another_transport(hostfile, cluster), mismatch(found))
    for warning in filter(None, warnings):
        click.echo(f"Warning: {warning}", err=True)
    if dry_run:
        click.echo(shlex.join([*_changed(environment), *line]))
        return
    addresses = [host.address for host in cluster.hosts] if cluster else []
    raise SystemExit(run_ranks(line, ranks=count, environment=environment, hosts=addresses))


def _another_transport(hostfile: Path | None, cluster: Cluster | None) -> str | None:
    if cluster is None or cluster.backend in (None, "mpi", "any"):
        return None
    return f"{hostfile}: backend {cluster.backend!r} is for mlx.launch; here ranks talk over MPI"


def _variables(given: Sequence[str]) -> dict[str, str]:
    """The values of ``NAME=VALUE``, and of ``NAME`` as it is here."""
    for one in given:
        if "=" not in one and one not in os.environ:
            raise LaunchError(f"--env: {one!r} is not set here, expected the name of a variable, or NAME=VALUE", 2)
    whole = [one if "=" in one else f"{one}={os.environ[one]}" for one in given]
    pairs = (check_variable("--env", one).partition("=") for one in whole)
    return {name: value for name, _, value in pairs}


def _told(environment: dict[str, str]) -> list[str]:
    """The variables that every rank gets, also where MPI does not pass all of them on."""
    return [name for name in environment if name.startswith(TELLING)]


def _changed(environment: dict[str, str]) -> list[str]:
    """Assignments of what the ranks' environment has beyond this one, to be put before a command."""
    changed = [f"{name}={value}" for name, value in environment.items() if os.environ.get(name) != value]
    return ["env", *sorted(changed)] if changed else []
