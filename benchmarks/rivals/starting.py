"""Starting the processes of a rival, on this machine or on hosts of the virtual cluster."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from launch.virtual import Cluster

from ..common import ROOT

GRACE = 10.0  # s that the other ranks have after the end of one that failed
LOCAL_TCP = {"MPIR_CVAR_NOLOCAL": "1", "FI_TCP_IFACE": "lo"}  # MPICH without shared memory, as gloo


class FailedError(Exception):
    """A rival that did not do its work, with the reason in one line.

    Attributes:
        done: Results of each rank from before the failure.
    """

    def __init__(self, reason: str, done: Sequence[list] = ()):
        super().__init__(reason)
        self.done = done


@dataclass(frozen=True)
class Command:
    """Line and environment of one process; `host` is an address of the virtual cluster, or empty."""

    line: Sequence[str]
    variables: Mapping[str, str]
    host: str = ""


def plain_commands(
    python: str,
    arguments: Sequence[str],
    ranks: int,
    cluster: Cluster | None,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> list[Command]:
    """Commands of ranks without a launcher: variables of PyTorch and of MLX say how they find each other."""
    hosts = cluster.addresses[:ranks] if cluster else [""] * ranks
    threads = str(1 if ranks > 1 or cluster else os.cpu_count())
    shared = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": hosts[0] or "127.0.0.1",
        "MASTER_PORT": str(random.randint(20000, 30000)),
        "GLOO_SOCKET_IFNAME": "eth0" if cluster else "lo",
        "OMP_NUM_THREADS": threads,
        "RINGATTN_THREADS": threads,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        **variables,
    }
    line = [python, "-m", *arguments]
    return [
        Command(line, {**shared, "RANK": str(rank), "MLX_RANK": str(rank)}, host) for rank, host in enumerate(hosts)
    ]


def ring_command(arguments: Sequence[str], ranks: int, cluster: Cluster | None) -> list[Command]:
    """Command of `ringattn launch` for these ranks, with one thread each. Without a cluster they use TCP as well."""
    where = ["--hosts", ",".join(cluster.addresses[:ranks])] if cluster else []
    launch = [sys.executable, "-m", "ringattn.cli", "launch", "-n", str(ranks), *where, "--threads", "1", "--"]
    variables = cluster.environment if cluster else LOCAL_TCP
    return [Command([*launch, sys.executable, "-m", *arguments], variables)]


def collect(commands: Sequence[Command], file: Path, ranks: int, timeout: float, cluster: Cluster | None) -> list[list]:
    """Run commands to their end. Return the results of each rank, from ``file.rank``.

    Raises:
        FailedError: A rank failed, or they took longer than `timeout` seconds. No process is left.
    """
    results = [Path(f"{file}.{rank}") for rank in range(ranks)]
    for result in results:
        result.unlink(missing_ok=True)
    with tempfile.TemporaryFile("w+") as output:
        processes = [_start(command, output, cluster) for command in commands]
        try:
            finished = _wait(processes, timeout)
        finally:
            _end(processes)
        found = [json.loads(result.read_text()) if result.exists() else {"done": []} for result in results]
        done = [one["done"] for one in found]
        failures = [one["failed"] for one in found if "failed" in one]
        codes = [process.returncode for process in processes]
        if failures:
            raise FailedError(failures[0], done)
        if not finished:
            raise FailedError(f"no answer within {timeout:.0f} s", done)
        if any(codes) or not all(done):
            raise FailedError(_last_line(output, codes), done)
        return done


def _start(command: Command, output, cluster: Cluster | None) -> subprocess.Popen:
    line = list(command.line)
    environment = {**os.environ, **command.variables}
    if command.host:
        assert cluster is not None
        settings = [f"{name}={value}" for name, value in command.variables.items()]
        remote = f"cd {shlex.quote(str(ROOT))} && exec env {shlex.join([*settings, *line])}"
        line = ["ssh", command.host, remote]
        environment = cluster.environment
    return subprocess.Popen(
        line, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True, text=True
    )


def _wait(processes: Sequence[subprocess.Popen], timeout: float) -> bool:
    """Wait for all processes, or for a failure. Return whether all ended in time."""
    end = time.monotonic() + timeout
    while any(process.poll() is None for process in processes):
        if any(process.returncode for process in processes):
            end = min(end, time.monotonic() + GRACE)
        if time.monotonic() > end:
            return any(process.returncode for process in processes)
        time.sleep(0.05)
    return True


def _end(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _last_line(output, codes: Sequence[int | None]) -> str:
    output.seek(0)
    lines = [line.strip() for line in output.read().splitlines() if line.strip()]
    killed = "killed, probably for its memory: " if 137 in codes or -9 in codes else ""
    return f"{killed}{lines[-1] if lines else f'exit codes {codes}'}"[:300]
