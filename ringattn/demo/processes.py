"""Worker processes of a task on this machine: start them, report their progress, and collect their results."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import RingAttentionError
from ..tracing.files import VARIABLE, join_names
from .task import ProgressFile, RankResult, ReadingTask


class WorkersFailedError(RingAttentionError):
    """The workers ended with an error; the message carries their last output."""


class TaskResult(NamedTuple):
    """Task with the results of all its ranks."""

    task: ReadingTask
    ranks: list[RankResult]


def run_task(
    task: ReadingTask, folder: Path, progress: Callable[[float], None], traces: Sequence[Path] = ()
) -> TaskResult:
    """Run `task` in worker processes on this machine.

    Args:
        task: Task to run.
        folder: Empty folder for the files of command and workers.
        progress: Function that receives from time to time the part of the prompt that is read.
        traces: Files for the trace of the ring.

    Raises:
        WorkersFailedError: A worker ended with an error.
    """
    task.write(folder)
    log = folder / "log"
    progress_file = ProgressFile(folder)
    with log.open("wb") as out:
        environment = {**os.environ, VARIABLE: join_names(traces)}
        workers = subprocess.Popen(_command(task, folder), stdout=out, stderr=out, env=environment)
    try:
        while workers.poll() is None:
            progress(progress_file.share())
            time.sleep(0.1)
    finally:
        if workers.poll() is None:  # interrupted: end the workers too
            workers.terminate()
            workers.wait()
    progress(progress_file.share())
    if workers.returncode:
        last = log.read_text(errors="replace").strip().splitlines()[-20:]
        raise WorkersFailedError("\n".join([f"the workers ended with status {workers.returncode}", *last]))
    return TaskResult(task, [RankResult.read(folder, rank) for rank in range(max(1, task.ranks))])


def _command(task: ReadingTask, folder: Path) -> list[str]:
    worker = [sys.executable, "-m", "ringattn.demo.rank_program", str(folder)]
    if task.plain:
        return worker
    return [sys.executable, "-m", "ringattn.cli", "launch", "-n", str(task.ranks), "--", *worker]
