"""Starting the ranks that examine their hosts and links, and never waiting for them longer than was said."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..cluster.mpiexec import LaunchError, find_mpiexec, mismatch
from .breakeven import Model
from .examination import Examination
from .records import read

SIGN_OF_LIFE = 10.0  # seconds without one after which a rank counts as dead
GRACE = 15.0  # for the launcher to end all ranks, once it is told to
DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4}  # of keys and values -> bytes


@dataclass(frozen=True)
class Where:
    """Where to look.

    Attributes:
        size: Ranks.
        options: Those of ``ringattn launch`` that say where they run.
        hosts: The host of every rank, as far as the user named it.
        mpiexec: The one to use; ``None`` for the best.
    """

    size: int
    options: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    mpiexec: str | None = None


def examine_cluster(where: Where, model: Model, dtype: str, seconds: float) -> Examination:
    """Have every rank look at its host and measure its links; without MPI, look at this machine alone.

    Args:
        where: Where.
        model: The attention that is timed and judged.
        dtype: Of its keys and values, a key of `DTYPES`.
        seconds: After so many the ranks are ended, and what they had found by then is all there is.
    """
    numbers = (model.heads, model.kv_heads, model.head_dim)
    worker = [sys.executable, "-m", "ringattn.doctor.worker", str(int(seconds + GRACE)), dtype, *map(str, numbers)]
    try:
        differs = mismatch(find_mpiexec(where.mpiexec))
    except LaunchError as error:
        ended, output, _ = _run(worker, seconds)
        return Examination(1, read(output), model, ended=ended, seconds=seconds, unlaunched=str(error))
    options = [*where.options, *(["--mpiexec", where.mpiexec] if where.mpiexec else [])]
    launch = ["launch", "-n", str(where.size), "--timeout", f"{SIGN_OF_LIFE:g}", *options, "--"]
    ended, output, said = _run([sys.executable, "-m", "ringattn.cli", *launch, *worker], seconds)
    words = launcher_words(said) if ended != 0 else ""
    return Examination(where.size, read(output), model, where.hosts, None, differs, ended, seconds, words)


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
