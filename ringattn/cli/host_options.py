"""Options for the hosts and processes of ranks, the same for all commands that start ranks."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import click

from ..errors import LaunchError
from ..launcher.hostfile import Cluster, parse_hosts, read_hostfile

_INTERFACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@-]*")


def _interface(context: click.Context, option: click.Parameter, given: str | None) -> str | None:
    if given is not None and not _INTERFACE.fullmatch(given):
        raise click.BadParameter(f"{given!r}, expected the name of a network interface")
    return given


HOSTS = (
    click.option("--hosts", metavar="A,B:2,...", help="Hosts to run on, in the order of the ring, with their slots."),
    click.option(
        "--hostfile",
        type=click.Path(path_type=Path),
        metavar="PATH",
        help="A file of hosts: MLX's JSON, or lines for MPICH or Open MPI.",
    ),
    click.option(
        "--interface",
        metavar="NAME",
        callback=_interface,
        help="The network interface of each host towards the others, such as bridge0.",
    ),
    click.option(
        "--mpiexec", metavar="PATH", help="The mpiexec to use.  [default: the one beside this Python, then PATH]"
    ),
)

PROCESSES = (
    click.option(
        "--env", "variables", multiple=True, metavar="NAME[=VALUE]", help="For the ranks' environment; repeatable."
    ),
    click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        metavar="S",
        help="Seconds without a heartbeat after which a rank counts as dead.",
    ),
    click.option(
        "--threads",
        type=click.IntRange(min=1),
        metavar="T",
        help="Threads per rank.  [default: the cores of its host, divided by the ranks there]",
    ),
)


def ranks_option(what: str, least: int = 1, most: int | None = None, default: int | None = None) -> Callable:
    """Option ``-n`` or ``--ranks``: number of ranks that a command starts, from `least` to `most`."""
    return click.option(
        "-n",
        "--ranks",
        type=click.IntRange(least, most),
        metavar="N",
        default=default,
        show_default=default is not None,
        help=what,
    )


tensor_option = click.option(
    "--tensor",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    metavar="T",
    help="Neighbours that share the weights; the context is spread over the groups of T ranks.",
)


def with_options(*options: Callable) -> Callable[[Callable], Callable]:
    """Decorator that gives a command these options, in this order."""

    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def chosen_cluster(hosts: str | None, hostfile: Path | None, interface: str | None) -> Cluster | None:
    """Hosts that the user named; ``None`` for this machine alone."""
    if hosts is not None and hostfile is not None:
        raise LaunchError("--hosts and --hostfile: both given, expected one of them", 2)
    if hosts is None and hostfile is None and interface is not None:
        raise LaunchError(f"--interface: {interface!r} without hosts, expected --hosts or --hostfile as well", 2)
    return parse_hosts(hosts) if hosts is not None else None if hostfile is None else read_hostfile(hostfile)


def count_ranks(ranks: int | None, cluster: Cluster | None) -> int:
    """Number of ranks to start: by default one for each slot."""
    if cluster is None:
        if ranks is None:
            raise click.UsageError("Missing option '-n', or --hosts or --hostfile.")
        return ranks
    if ranks is not None and ranks > cluster.slots:
        raise LaunchError(f"-n: {ranks}, expected at most {cluster.slots}, the slots of the hosts (HOST:SLOTS)", 2)
    return cluster.slots if ranks is None else ranks
