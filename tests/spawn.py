"""Start programs on several ranks, and never leave one behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
_BESIDE_PYTHON = Path(sys.executable).with_name("mpiexec")
MPIEXEC = str(_BESIDE_PYTHON) if _BESIDE_PYTHON.exists() else shutil.which("mpiexec")

_OF_A_RANK = {
    **{"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # pytest imports all of hypothesis otherwise, 0.8 s of each rank
}


class Result(NamedTuple):
    code: int | None  # None: it had to be killed
    output: str  # of all ranks
    seconds: float

    def __str__(self) -> str:
        ended = "was killed" if self.code is None else f"ended with {self.code}"
        return f"it {ended} after {self.seconds:.1f} s\n{self.output}"


def spawn(
    size: int,
    arguments: Sequence[str],
    *,
    timeout: float,
    env: Mapping[str, str] | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Result:
    """Run ``python *arguments`` on `size` ranks, at most `timeout` seconds; `meanwhile` is called while it runs."""
    assert MPIEXEC is not None
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI_", "MPI"))}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "mpiexec").open("wb") as output:
        process = subprocess.Popen(
            [MPIEXEC, *_apart(folder), "-n", str(size), sys.executable, *arguments],
            cwd=ROOT,
            env={**inherited, **_OF_A_RANK, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code: int | None = None
        try:
            meanwhile()
            code = process.wait(timeout - (time.monotonic() - begin))
        except subprocess.TimeoutExpired:
            pass
        finally:
            _kill_tree(process)
        seconds = time.monotonic() - begin
        files = sorted(Path(folder).iterdir())
        texts = [f"--- {file.name}\n{file.read_text(errors='replace')}" for file in files]
        return Result(code, "\n".join(texts), seconds)


def _heed() -> None:
    """What a shell starts in the background inherits that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def spawn_mlx(
    size: int,
    arguments: Sequence[str],
    *,
    timeout: float,
    env: Mapping[str, str] | None = None,
    but: Collection[int] = (),
) -> list[Result]:
    """Run ``python *arguments`` on `size` ranks of mx.distributed, each until it ends by itself.

    As mlx.launch does, but it ends no rank because another one failed: what a rank does then is what is looked at.
    When only the ranks in `but` are left, they are killed.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI_", "MPI"))}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        hosts = Path(folder) / "hosts"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]) if size > 1 else "")
        logs = [Path(folder) / f"rank {rank}" for rank in range(size)]
        processes = []
        for rank, log in enumerate(logs):
            own = {**_OF_A_RANK, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
            output = stack.enter_context(log.open("wb"))
            processes.append(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    cwd=ROOT,
                    env={**inherited, **own, **(env or {})},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    preexec_fn=_heed,
                )
            )
        ended: dict[int, float] = {}
        try:
            while not ended.keys() >= set(range(size)) - set(but) and time.monotonic() - begin < timeout:
                for rank, process in enumerate(processes):
                    if rank not in ended and process.poll() is not None:
                        ended[rank] = time.monotonic() - begin
                time.sleep(0.02)
        finally:
            for rank, process in enumerate(processes):
                if rank not in ended:
                    process.kill()
                process.wait()
        return [
            Result(p.returncode if r in ended else None, log.read_text(errors="replace"), ended.get(r, timeout))
            for r, (p, log) in enumerate(zip(processes, logs))
        ]


def under_load(seconds: float) -> float:
    """Time limit for work that takes `seconds` on an idle machine, longer on a machine with other work."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [sock.getsockname()[1] for sock in sockets]


def _apart(folder: str) -> list[str]:
    """What makes mpiexec keep the output of the ranks apart, where it can."""
    into = f"{folder}/rank %r"
    return ["-outfile-pattern", into, "-errfile-pattern", into] if _is_hydra() else []


@cache
def _is_hydra() -> bool:
    """Whether mpiexec is MPICH's."""
    return "HYDRA" in subprocess.run([str(MPIEXEC), "--version"], capture_output=True, text=True, check=False).stdout


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill mpiexec and all that it started: every rank is in a session of its own."""
    if process.poll() is not None:
        return
    family = {process.pid}
    table = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    children: dict[int, list[int]] = {}
    for line in table.splitlines():
        pid, parent = map(int, line.split())
        children.setdefault(parent, []).append(pid)
    queue = [process.pid]
    while queue:
        born = children.get(queue.pop(), [])
        family.update(born)
        queue.extend(born)
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
