"""Start of the ranks of a command on this machine or on hosts: from the options to the launcher's command line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import click

from ..errors import ArgumentError, LaunchError
from ..launcher.hostfile import Cluster, check_variable
from ..launcher.mpiexec import Mpiexec, build_command, build_environment, check_command, find_mpiexec, mismatch
from ..launcher.preflight import check_hosts, home_address
from ..launcher.supervisor import run
from ..transport.addresses import ADDRESSES, INTERFACE, RDMA
from ..transport.base import Ring
from ..transport.environment import launched_by
from .host_options import chosen_cluster, count_ranks

PASSED_ON = ("RINGATTN_", "PYTHON", "MLX_", "MPI4PY_", "FI_", "UCX_", "HF_", "OMP_", "OPENBLAS_", "MKL_", "VECLIB_")
STARTED = "RINGATTN_STARTED"  # environment variable of ranks that a command started itself
FOR_WRAPPERS = ("RINGATTN_LAUNCHER", "RINGATTN_LAUNCH_DIR")  # known only when the launcher runs


@dataclass(frozen=True)
class Placement:
    """Values of `ranks_option`, `HOSTS` and `PROCESSES` in `host_options`: hosts and settings of the ranks."""

    ranks: int | None = None
    hosts: str | None = None
    hostfile: Path | None = None
    interface: str | None = None
    mpiexec: str | None = None
    variables: tuple[str, ...] = ()
    timeout: float | None = None
    threads: int | None = None

    @classmethod
    def pop_from(cls, options: dict[str, Any]) -> Placement:
        """Remove the placement from a command's `options` and return it."""
        return cls(**{field.name: options.pop(field.name) for field in fields(cls)})

    @property
    def given(self) -> list[str]:
        """Options that the user gave, as written on the command line."""
        names = {"ranks": "-n", "variables": "--env"}
        return [names.get(f.name, f"--{f.name}") for f in fields(self) if getattr(self, f.name) not in (None, ())]

    @property
    def starts_ranks(self) -> bool:
        """Whether the options ask for more than this process."""
        return (self.ranks or 1) > 1 or any(name != "-n" for name in self.given)


def start_again(placement: Placement, forward_sigint: bool = False) -> int:
    """Run this command again on ranks under a launcher. Return the exit code."""
    own = replace(placement, variables=(*placement.variables, f"{STARTED}=1"))
    if placement.hosts is None and placement.hostfile is None:
        own = replace(own, ranks=placement.ranks or 1)
    ranks = prepare(own, [sys.executable, "-m", "ringattn.cli", *sys.argv[1:]], prefix=False)
    return ranks.run(forward_sigint=forward_sigint, explained=True)


def check_placement(placement: Placement, ring: Ring) -> None:
    """Refuse placement options under a launcher, which has placed the ranks already."""
    if placement.given and STARTED not in os.environ and launched_by() != "solo":
        given = ", ".join(placement.given)
        raise ArgumentError(f"{given}: given under a launcher, which has started {ring.size} ranks")


@dataclass(frozen=True)
class RankLaunch:
    """Command line of ranks that are ready to start."""

    line: list[str]
    environment: dict[str, str]
    count: int
    addresses: list[str]

    def run(self, **options: bool) -> int:
        """Start the ranks and wait for them. Return the exit code. `options` are those of `launcher.supervisor.run`."""
        return run(self.line, ranks=self.count, environment=self.environment, hosts=self.addresses, **options)


def prepare(
    placement: Placement, command: Sequence[str], *, prefix: bool | None = None, dry_run: bool = False
) -> RankLaunch:
    """Check everything that can be checked before ranks of `command` start. Print warnings on standard error.

    Args:
        placement: Hosts and settings of the ranks.
        command: Program and its arguments.
        prefix: Whether each line of output begins with its rank. Default: only with hosts.
        dry_run: Whether to omit the checks that contact the hosts.

    Raises:
        LaunchError: The ranks cannot be started there.
    """
    cluster = chosen_cluster(placement.hosts, placement.hostfile, placement.interface)
    count = count_ranks(placement.ranks, cluster)
    given = _variables([*(cluster.variables if cluster else ()), *placement.variables])
    given |= _for_rows(cluster, placement.interface)
    environment = _environment(placement, cluster is not None, prefix, given)
    mpiexec = find_mpiexec(placement.mpiexec)
    if not dry_run:
        check_command(command)
    if cluster is not None and not dry_run:
        check_hosts(cluster.hosts, mpiexec, placement.interface)
    line = build_command(
        mpiexec,
        count,
        command,
        hosts=cluster.hosts if cluster else (),
        home=home_address(cluster.hosts) if cluster else "",
        interface=placement.interface,
        variables=[*given, *_passed_on(environment), *(() if dry_run else FOR_WRAPPERS)],
    )
    for warning in _warnings(placement, cluster, mpiexec):
        click.echo(f"Warning: {warning}", err=True)
    return RankLaunch(line, environment, count, [host.address for host in cluster.hosts] if cluster else [])


def _environment(placement: Placement, remote: bool, prefix: bool | None, given: Mapping[str, str]) -> dict[str, str]:
    return build_environment(
        threads=placement.threads,
        timeout=placement.timeout,
        interface=placement.interface,
        remote=remote,
        prefix=remote if prefix is None else prefix,
        base={**os.environ, **given},
    )


def _for_rows(cluster: Cluster | None, interface: str | None) -> dict[str, str]:
    """Variables with which ranks on several hosts connect groups of `mx.distributed`, for `ringattn.grid`."""
    if cluster is None:
        return {}
    variables = {ADDRESSES: ",".join(host.address for host in cluster.hosts)}
    if interface is not None:
        variables[INTERFACE] = interface
    devices = [host.rdma for host in cluster.hosts]
    if all(len(own) == len(devices) == cluster.slots for own in devices):  # one rank a host
        variables[RDMA] = json.dumps(devices)
    return variables


def _warnings(placement: Placement, cluster: Cluster | None, mpiexec: Mpiexec) -> list[str]:
    other = None
    if cluster is not None and cluster.backend not in (None, "mpi", "any"):
        other = f"{placement.hostfile}: backend {cluster.backend!r} is for mlx.launch; here ranks talk over MPI"
    return [warning for warning in (other, mismatch(mpiexec)) if warning]


def _variables(given: Sequence[str]) -> dict[str, str]:
    """Variables given as ``NAME=VALUE``, or as ``NAME`` with the value in this process."""
    for one in given:
        if "=" not in one and one not in os.environ:
            raise LaunchError(f"--env: {one!r} is not set here, expected the name of a variable, or NAME=VALUE", 2)
    whole = [one if "=" in one else f"{one}={os.environ[one]}" for one in given]
    pairs = (check_variable("--env", one).partition("=") for one in whole)
    return {name: value for name, _, value in pairs}


def _passed_on(environment: Mapping[str, str]) -> list[str]:
    """Names of the variables that every rank gets, even if its MPI does not pass on all variables."""
    return [name for name in environment if name.startswith(PASSED_ON)]
