"""Start of the ranks that examine their hosts and links, with a time limit."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import LaunchError
from ..launcher.hostfile import Cluster, Host
from ..launcher.mpiexec import Mpiexec, find_mpiexec, mismatch
from ..launcher.preflight import find_troubles, home_address
from .breakeven import AttentionModel
from .connectivity import ENDPOINT, Coordinator
from .diagnosis.examination import Examination
from .records import RankReports, parse_records

HEARTBEAT_TIMEOUT = 10.0  # s without a heartbeat after which a rank counts as dead
GRACE = 15.0  # s for the launcher to end all ranks after SIGTERM
DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4}  # of keys and values -> bytes


@dataclass(frozen=True)
class Target:
    """Ranks to examine.

    Attributes:
        size: Number of ranks.
        cluster: Hosts of the ranks; ``None``: this machine.
        interface: Network interface of the hosts for messages.
        mpiexec: Path of the mpiexec to use; ``None`` for the default.
        tensor: Number of neighbours that share a model's weights.
    """

    size: int
    cluster: Cluster | None = None
    interface: str | None = None
    mpiexec: str | None = None
    tensor: int = 1


def examine_cluster(target: Target, model: AttentionModel, dtype: str, seconds: float) -> Examination:
    """Have every rank describe its host and measure its links. Without MPI, examine this machine alone.

    Hosts on which no rank can start are left out.

    Args:
        target: Ranks to examine.
        model: Attention to time and to judge.
        dtype: Dtype of keys and values, a key of `DTYPES`.
        seconds: Time limit, after which the ranks are ended. The result then holds the records up to that time.

    Raises:
        LaunchError: This machine has no address that the hosts can use.
    """
    numbers = (model.heads, model.kv_heads, model.head_dim, target.tensor)
    worker = [sys.executable, "-m", "ringattn.doctor.worker", str(int(seconds + GRACE)), dtype, *map(str, numbers)]
    try:
        mpiexec = find_mpiexec(target.mpiexec)
    except LaunchError as error:
        status, output, _ = _run(worker, seconds)
        reports = parse_records(output)
        return Examination(1, reports, model, exit_status=status, time_limit=seconds, launch_problem=str(error))
    requested = target.cluster.hosts if target.cluster else ()
    troubles = tuple(find_troubles(requested, mpiexec, target.interface)) if requested else ()
    hosts = [host for host in requested if host not in [trouble.host for trouble in troubles]]
    if requested and not hosts:
        return Examination(0, RankReports(), model, troubles=troubles)
    return replace(_examine(target, mpiexec, hosts, worker, seconds), model=model, troubles=troubles)


def _examine(
    target: Target, mpiexec: Mpiexec, hosts: Sequence[Host], worker: Sequence[str], seconds: float
) -> Examination:
    """Run the worker on these hosts and collect the ranks' reports."""
    names = [host.ssh for host in hosts for _ in range(host.slots)][: target.size]
    size = len(names) if hosts else target.size
    line = [sys.executable, "-m", "ringattn.cli", "launch", "-n", str(size), "--timeout", f"{HEARTBEAT_TIMEOUT:g}"]
    with _options(target, hosts, size) as options:
        several = [",".join(name.rpartition("@")[2] for name in names)] if hosts else []
        command = [*line, "--mpiexec", mpiexec.path, *options, "--", *worker, *several]
        status, output, errors = _run(command, seconds)
    return Examination(
        size,
        parse_records(output),
        hosts=tuple(names),
        tensor=target.tensor,
        mpi_mismatch=mismatch(mpiexec),
        exit_status=status,
        time_limit=seconds,
        launcher_message=launcher_message(errors) if status != 0 else "",
    )


@contextmanager
def _options(target: Target, hosts: Sequence[Host], size: int) -> Iterator[list[str]]:
    """Open a `Coordinator` for the ranks on these hosts, and yield the options of ``ringattn launch``.

    Variables are passed by a file that no other user can read, since all users can read the command line.
    """
    if target.cluster is None:
        yield []
        return
    with closing(Coordinator(home_address(hosts), size)) as coordinator, tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "hosts.json")
        entries = [_entry(host) for host in hosts]
        variables = [*target.cluster.variables, f"{ENDPOINT}={coordinator.endpoint}"]
        path.write_text(json.dumps({"hosts": entries, "envs": variables}))
        through = ["--interface", target.interface] if target.interface else []
        yield ["--no-prefix", "--hostfile", str(path), *through]


def _entry(host: Host) -> dict[str, object]:
    """A host in the form of MLX's host files."""
    return {"ssh": host.ssh, "slots": host.slots, **({"rdma": list(host.rdma)} if host.rdma else {})}


def _run(line: Sequence[str], seconds: float) -> tuple[int | None, str, str]:
    """Exit status (``None`` after the time limit), standard output and standard error of a command."""
    process = subprocess.Popen(
        line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    try:
        output, errors = process.communicate(timeout=seconds)
        return process.returncode, output, errors
    except subprocess.TimeoutExpired:
        return None, *_end(process)
    finally:
        if process.poll() is None:  # Ctrl-C
            _end(process)


def _end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Have the launcher end its ranks, and return the output."""
    process.terminate()
    try:
        return process.communicate(timeout=GRACE)
    except subprocess.TimeoutExpired:
        process.kill()  # the ranks then end by themselves
        return process.communicate()


def launcher_message(errors: str) -> str:
    """Lines of a launcher's standard error that name the cause.

    These are all lines with "Error", else the first line of the launcher itself, else the last line.
    """
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    named = [line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")]
    own = [line.removeprefix("ringattn: ") for line in lines if line.startswith("ringattn: ")]
    return "; ".join(named) or next(iter([*own, *reversed(lines)]), "")
