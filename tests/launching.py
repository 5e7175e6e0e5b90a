"""Start `ringattn launch` with small programs, and see which of their processes live."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from ringattn.launcher.processes import start_time

ROOT = Path(__file__).parents[2]
RANK = "import os, signal, sys, time\nrank = int(os.environ.get('PMI_RANK', os.environ.get('OMPI_COMM_WORLD_RANK')))\n"
IGNORE = "for s in (signal.SIGTERM, signal.SIGINT): signal.signal(s, signal.SIG_IGN)\n"
NOTE_PID = "open(os.path.join(sys.argv[1], str(rank)), 'w').write(str(os.getpid()))\n"


def environment(**changed: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    names = ("NUM_THREADS", "MAXIMUM_THREADS", "RINGATTN")
    kept = {name: value for name, value in os.environ.items() if not any(part in name for part in names)}
    return {**kept, "PYTHONPATH": path, **changed}


def start(*arguments: str, cwd: str | Path | None = None, **changed: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "ringattn.cli", "launch", *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    heed = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # nohup's programs inherit that it is ignored
    return subprocess.Popen(line, text=True, env=environment(**changed), cwd=cwd, preexec_fn=heed, **pipes)


def launch(*arguments: str, stdin: str = "", **changed: str) -> subprocess.CompletedProcess[str]:
    process = start(*arguments, **changed)
    try:
        out, err = process.communicate(stdin, timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()  # the ranks notice
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def pids(folder: Path, count: int) -> list[int]:
    """The pids that `count` ranks have noted in `folder`."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        notes = [path.read_text() for path in folder.iterdir() if path.name.isdigit()]
        if len(notes) == count and all(notes):
            return [int(note) for note in notes]
        time.sleep(0.01)
    raise AssertionError(f"{count} ranks expected, {sorted(folder.iterdir())} started")


def parents() -> dict[int, int]:
    """The parent of every process."""
    line = ["ps", "-A", "-o", "pid=", "-o", "ppid="]
    shown = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    return {int(pid): int(parent) for pid, parent in map(str.split, shown.splitlines())}


def living(processes: list[int]) -> list[int]:
    return [pid for pid in processes if start_time(pid)]
