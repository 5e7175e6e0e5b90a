"""Starting the ranks that examine their hosts and links, and never waiting for them longer than was said."""

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
from .breakeven import Model
from .connectivity import ENDPOINT, Coordinator
from .examination import Examination
from .records import Told, read

SIGN_OF_LIFE = 10.0  # seconds without one after which a rank counts as dead
GRACE = 15.0  # for the launcher to end all ranks, once it is told to
DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4}  # of keys and values -> bytes


@dataclass(frozen=True)
class Where:
    """Where to look.

    Attributes:
        size: Ranks.
        cluster: The hosts they run on; ``None``: this machine.
        interface: That of the hosts that messages take.
        mpiexec: The one to use; ``None`` for the best.
    """

    size: int
    cluster: Cluster | None = None
    interface: str | None = None
    mpiexec: str | None = None


def examine_cluster(where: Where, model: Model, dtype: str, seconds: float) -> Examination:
    """Have every rank look at its host and measure its links; without MPI, look at this machine alone.

    Hosts on which no rank can start are left out.

    Args:
        where: Where.
        model: The attention that is timed and judged.
        dtype: Of its keys and values, a key of `DTYPES`.
        seconds: After so many the ranks are ended, and what they had found by then is all there is.

    Raises:
        LaunchError: The hosts cannot be told where this machine is.
    """
    numbers = (model.heads, model.kv_heads, model.head_dim)
    worker = [sys.executable, "-m", "ringattn.doctor.worker", str(int(seconds + GRACE)), dtype, *map(str, numbers)]
    try:
        mpiexec = find_mpiexec(where.mpiexec)
    except LaunchError as error:
        ended, output, _ = _run(worker, seconds)
        return Examination(1, read(output), model, ended=ended, seconds=seconds, unlaunched=str(error))
    asked = where.cluster.hosts if where.cluster else ()
    troubles = tuple(find_troubles(asked, mpiexec, where.interface)) if asked else ()
    hosts = [host for host in asked if host not in [trouble.host for trouble in troubles]]
    if asked and not hosts:
        return Examination(0, Told(), model, troubles=troubles)
    return replace(_examine(where, mpiexec, hosts, worker, seconds), model=model, troubles=troubles)


def _examine(
    where: Where, mpiexec: Mpiexec, hosts: Sequence[Host], worker: Sequence[str], seconds: float
) -> Examination:
    """What the ranks find out on these of the hosts."""
    names = [host.ssh for host in hosts for _ in range(host.slots)][: where.size]
    size = len(names) if hosts else where.size
    line = [sys.executable, "-m", "ringattn.cli", "launch", "-n", str(size), "--timeout", f"{SIGN_OF_LIFE:g}"]
    with _options(where, hosts, size) as options:
        several = [",".join(name.rpartition("@")[2] for name in names)] if hosts else []
        ended, output, said = _run([*line, "--mpiexec", mpiexec.path, *options, "--", *worker, *several], seconds)
    words = launcher_words(said) if ended != 0 else ""
    differs = mismatch(mpiexec)
    return Examination(
        size, read(output), hosts=tuple(names), mismatch=differs, ended=ended, seconds=seconds, launcher=words
    )


@contextmanager
def _options(where: Where, hosts: Sequence[Host], size: int) -> Iterator[list[str]]:
    """Those of ``ringattn launch`` for these of the hosts, with a `Coordinator` for the ranks on them.

    Variables go by a file that no other user can read, and not by the command line, which all can.
    """
    if where.cluster is None:
        yield []
        return
    with closing(Coordinator(home_address(hosts), size)) as coordinator, tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "hosts.json")
        entries = [{"ssh": host.ssh, "slots": host.slots} for host in hosts]
        variables = [*where.cluster.variables, f"{ENDPOINT}={coordinator.endpoint}"]
        path.write_text(json.dumps({"hosts": entries, "envs": variables}))
        through = ["--interface", where.interface] if where.interface else []
        yield ["--no-prefix", "--hostfile", str(path), *through]


def _run(line: Sequence[str], seconds: float) -> tuple[int | None, str, str]:
    """Exit status (``None`` if it had to be ended), output, and what it said on standard error."""
    process = subprocess.Popen(
        line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    try:
        output, said = process.communicate(timeout=seconds)
        return process.returncode, output, said
    except subprocess.TimeoutExpired:
        return None, *_end(process)
    finally:
        if process.poll() is None:  # Ctrl-C
            _end(process)


def _end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Have the launcher end its ranks; what all of them had said."""
    process.terminate()
    try:
        return process.communicate(timeout=GRACE)
    except subprocess.TimeoutExpired:
        process.kill()  # the ranks notice
        return process.communicate()


def launcher_words(said: str) -> str:
    """What tells best, of a launcher's standard error, what went wrong: all of its errors, or its first line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")]
    told = [line.removeprefix("ringattn: ") for line in lines if line.startswith("ringattn: ")]
    return "; ".join(errors) or next(iter([*told, *reversed(lines)]), "")
