"""The options that say where ranks run, for all commands that start them on hosts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from ..cluster.hosts import Cluster, parse_hosts, read_hostfile
from ..cluster.mpiexec import LaunchError

_OPTIONS = (
    click.option("--hosts", metavar="A,B:2,...", help="Hosts to run on, in the order of the ring, with their slots."),
    click.option(
        "--hostfile",
        type=click.Path(path_type=Path),
        metavar="PATH",
        help="A file of hosts: MLX's JSON, or lines for MPICH or Open MPI.",
    ),
    click.option("--interface", metavar="NAME", help="The network interface that leads to the hosts, such as bridge0."),
)


def host_options(command: Callable) -> Callable:
    """``--hosts``, ``--hostfile`` and ``--interface``."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def chosen(hosts: str | None, hostfile: Path | None) -> Cluster | None:
    """The hosts that the user named; ``None`` for this machine alone."""
    if hosts is not None and hostfile is not None:
        raise LaunchError("--hosts and --hostfile: both given, expected one of them", 2)
    return parse_hosts(hosts) if hosts is not None else None if hostfile is None else read_hostfile(hostfile)


def count_ranks(ranks: int | None, cluster: Cluster | None) -> int:
    """How many ranks to start: by default one for each slot."""
    if cluster is None:
        if ranks is None:
            raise click.UsageError("Missing option '-n', or --hosts or --hostfile.")
        return ranks
    if ranks is not None and ranks > cluster.slots:
        raise LaunchError(f"-n: {ranks}, expected at most {cluster.slots}, the slots of the hosts (HOST:SLOTS)", 2)
    return cluster.slots if ranks is None else ranks
