"""One rank of a rival of the operator: its answers compared, then timed.

    python -m benchmarks.rivals.worker FILE MODULE WAY TASKS

Runs in the environment of the rival. TASKS is JSON: a list of problems, each with the folder of its reference and the
number of timed calls. ``FILE.rank`` gets the seconds of each call, the errors and the versions for each problem, and
the reason of a failure, which ends the process. The first rival of a problem writes its answer to the folder, after a
comparison of some rows with float64; all others are compared with it.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .attend import Work
from .problem import NAMES, SAMPLED, Problem, exact_rows, relative_error

MOST = 1e-4  # difference of a result, of its largest value


def main() -> None:
    """Run one rank; leave with 1 if it failed, and do not wait for other ranks."""
    file, module, way, tasks = sys.argv[1:]
    rank, size = place()
    report(file, rank, measure(module, way, json.loads(tasks), rank, size))


def report(file: str, rank: int, results: Iterable[Any]) -> None:
    """Write results to ``file.rank`` as they come, and the reason of an error, after which the process ends with 1."""
    found: dict[str, Any] = {"done": []}
    path = Path(f"{file}.{rank}")
    try:
        for result in results:
            found["done"].append(result)
            path.write_text(json.dumps(found))
    except Exception as error:
        path.write_text(json.dumps({**found, "failed": one_line(error)}))
        os._exit(1)


def place() -> tuple[int, int]:
    """Rank and number of ranks, from the environment of any of the launchers."""
    for names in (("RANK", "WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")):
        if names[0] in os.environ:
            rank, size = (int(os.environ[name]) for name in names)
            return rank, size
    return 0, 1


def measure(module: str, way: str, tasks: list[dict[str, Any]], rank: int, size: int) -> Iterator[dict[str, Any]]:
    """Seconds of the calls of one rank for each task, after a check of its answer."""
    rival = importlib.import_module(f".attend.{module}", __package__)
    for task in tasks:
        problem = Problem(**task["problem"])
        work: Work = rival.prepare(problem, way, rank, size)
        errors = compare(problem, work.positions, work.answer(), Path(task["reference"]))
        wrong = {name: error for name, error in errors.items() if not error < MOST}
        if wrong:
            parts = (f"{name} differs by {error:.1g} of its largest value" for name, error in wrong.items())
            raise ValueError(f"wrong answer: {', '.join(parts)}")
        seconds = [_timed(work) for _ in range(task["repeats"])]
        work.barrier()
        work.close()
        yield {"seconds": seconds, "errors": errors, "versions": rival.versions()}


def _timed(work: Work) -> float:
    work.barrier()
    start = time.perf_counter()
    work.call()
    return time.perf_counter() - start


def compare(problem: Problem, positions: np.ndarray, found: list[np.ndarray], reference: Path) -> dict[str, float]:
    """Errors of the results, of the largest value of each; for the first answer, of some rows against float64."""
    files = [reference / f"{name}.npy" for name, _ in zip(NAMES, found)]
    if all(file.exists() for file in files):
        expected = [np.load(file, mmap_mode="r") for file in files]
        return {name: relative_error(x, e[:, positions]) for name, x, e in zip(NAMES, found, expected)}
    assert len(positions) == problem.tokens, "the first rival must hold all tokens"
    rows = np.linspace(0, problem.tokens - 1, SAMPLED).astype(int)
    errors = {"out": relative_error(found[0][:, rows], exact_rows(problem, rows))}
    if errors["out"] < MOST:
        for file, x in zip(files, found):
            np.save(file, x)
    return errors


def one_line(error: Exception) -> str:
    """Kind of an error and the line of its message that says most: compilers name the cause in a later line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = [line for line in lines[1:] if re.search(r"not support|[a-z]Error\b", line)]
    text = [*lines[:1], *cause[:1]]
    return f"{type(error).__name__}: {' '.join(text)}".partition(". This could be")[0][:300]


if __name__ == "__main__":
    main()
