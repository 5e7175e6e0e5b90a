"""Start the workers of one job on this machine, follow them, and collect what they saw."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..errors import RingAttentionError
from .job import Figures, Job, Progress


class RunError(RingAttentionError):
    """The workers did not finish; the message carries what they printed last."""


class Run(NamedTuple):
    """What a job gave: the figures of all ranks."""

    job: Job
    figures: list[Figures]


def run(job: Job, folder: Path, progress: Callable[[float], None]) -> Run:
    """Run `job` in worker processes of this machine.

    Args:
        folder: An empty folder for what parent and workers tell each other.
        progress: Called now and then with the part of the prompt that is read.

    Raises:
        RunError: A worker ended with an error.
    """
    job.write(folder)
    log, told = folder / "log", Progress(folder)
    with log.open("wb") as out:
        workers = subprocess.Popen(_command(job, folder), stdout=out, stderr=out)
    try:
        while workers.poll() is None:
            progress(told.share())
            time.sleep(0.1)
    finally:
        if workers.poll() is None:  # interrupted: leave nobody behind
            workers.terminate()
            workers.wait()
    progress(told.share())
    if workers.returncode:
        last = log.read_text(errors="replace").strip().splitlines()[-20:]
        raise RunError("\n".join([f"the workers ended with status {workers.returncode}", *last]))
    return Run(job, [Figures.read(folder, rank) for rank in range(max(1, job.ranks))])


def _command(job: Job, folder: Path) -> list[str]:
    worker = [sys.executable, "-m", "ringattn.demo.worker", str(folder)]
    if job.plain:
        return worker
    return [sys.executable, "-m", "ringattn.cli", "launch", "-n", str(job.ranks), "--", *worker]
