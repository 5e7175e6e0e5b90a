"""Start the workers of one job on this machine, follow them, and collect what they measured."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import RingAttentionError
from ..layout import Layout
from ..lm.gguf import find_smollm2
from .job import Figures, Job, Progress
from .smollm import load_model, load_tokenizer


class RunError(RingAttentionError):
    """The workers did not finish; the message carries what they printed last."""


class Run(NamedTuple):
    """What a job gave: the figures of all ranks and the last layer's output ``[tokens, width]``."""

    job: Job
    figures: list[Figures]
    hidden: np.ndarray


def read_text() -> tuple[Path, np.ndarray]:
    """The model's path and the tokens of the text: the help topics that ship with CPython, one after the other.

    Raises:
        MissingExtraError: The model or its tokenizer is not installed.
    """
    from pydoc_data.topics import topics

    path = find_smollm2()
    tokenizer = load_tokenizer(load_model(path))
    return path, np.array(tokenizer.encode("\n\n".join(topics.values())).ids, np.int32)


def run(job: Job, tokens: np.ndarray, folder: Path, progress: Callable[[int], None]) -> Run:
    """Run `job` over the first of `tokens` in worker processes of this machine.

    Args:
        folder: An empty folder for what parent and workers tell each other.
        progress: Called now and then with the number of steps done so far, of ``ranks * layers * layer_steps``.

    Raises:
        RunError: A worker ended with an error.
    """
    job.write(folder, tokens[: job.tokens])
    log = folder / "log"
    bars = [Progress(folder, rank) for rank in range(job.ranks)]
    with log.open("wb") as out:
        workers = subprocess.Popen(_command(job, folder), stdout=out, stderr=out)
    try:
        while workers.poll() is None:
            progress(sum(bar.done() for bar in bars))
            time.sleep(0.1)
    finally:
        if workers.poll() is None:  # interrupted: leave nobody behind
            workers.terminate()
            workers.wait()
    progress(sum(bar.done() for bar in bars))
    if workers.returncode:
        last = log.read_text(errors="replace").strip().splitlines()[-20:]
        raise RunError("\n".join([f"the workers ended with status {workers.returncode}", *last]))
    return _collect(job, folder)


def _command(job: Job, folder: Path) -> list[str]:
    worker = [sys.executable, "-m", "ringattn.demo.worker", str(folder)]
    if job.ranks == 1:
        return worker
    return [sys.executable, "-m", "ringattn.cli", "launch", "-n", str(job.ranks), "--", *worker]


def _collect(job: Job, folder: Path) -> Run:
    figures = [Figures.read(folder, rank) for rank in range(job.ranks)]
    parts = [np.load(folder / f"hidden-{rank}.npy") for rank in range(job.ranks)]
    return Run(job, figures, Layout.zigzag(job.tokens, job.ranks).unshard(parts, axis=0))
