"""How a program on a ring ends under `ringattn launch`: the exit code, and ranks that never come to the ring."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from spawn import ROOT, under_load

pytestmark = pytest.mark.ranks

TIMEOUT = 3
WITH = """
import os, sys, time
import ringattn as ra
with ra.init() as ring:
    ring.barrier()
    {body}
"""
BEFORE = """
import os, signal, sys, time
import ringattn as ra
from ringattn.launcher.rank_wrapper import launched_rank
if launched_rank() == "1":
    {body}
with ra.init() as ring:
    ring.barrier()
"""


def launch(folder: Path, program: str, ranks: int = 3) -> tuple[subprocess.CompletedProcess, float]:
    path = folder / "program.py"
    path.write_text(program)
    line = [sys.executable, "-m", "ringattn.cli", "launch", "-n", str(ranks), "--timeout", str(TIMEOUT), str(path)]
    begin = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    return done, time.monotonic() - begin


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("sys.exit(0)", 0),
        ("sys.exit(3)", 3),
        ("sys.exit(5) if ring.rank == 1 else ring.barrier()", 5),
        ("sys.exit(0) if ring.rank == 1 else ring.barrier()", 1),
        ("sys.exit('no') if ring.rank == 1 else ring.barrier()", 1),
    ],
)
def test_exit_code(tmp_path: Path, body: str, code: int) -> None:
    """That of the rank that failed, also where the others notice first."""
    done, _ = launch(tmp_path, WITH.format(body=body))
    assert done.returncode == code, done.stderr
    assert ("RingError" in done.stderr) == (code in (5, 1)), done.stderr


def test_the_cause_counts_and_not_what_came_of_it(tmp_path: Path) -> None:
    body = """
    if ring.rank == 1:
        raise ValueError("boom")
    try:
        ring.barrier()
    except ra.RingError:
        os._exit(42)
"""
    done, _ = launch(tmp_path, WITH.format(body=body))
    assert done.returncode == 1 and "ValueError: boom" in done.stderr, done.stderr
    assert "exited with code 42" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("sys.exit(0)", "had ended: 1"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", "stopped: 1"),
    ],
)
def test_a_rank_that_never_comes(tmp_path: Path, body: str, why: str) -> None:
    """The others are in MPI's own start, which would wait for ever."""
    done, seconds = launch(tmp_path, BEFORE.format(body=body))
    assert done.returncode == 1 and seconds < under_load(TIMEOUT + 5 + 2), done.stderr  # 2: for Python to start
    assert f"no ring within {TIMEOUT} s: ranks that wait for it in init: 0, " in done.stderr, done.stderr
    assert why in done.stderr and "SIGKILL" not in done.stderr, done.stderr


def test_a_ring_that_did_not_open_is_not_waited_for(tmp_path: Path) -> None:
    """A program that catches the error may go on for as long as it likes."""
    program = f"""
import time
import ringattn as ra
try:
    ra.init(timeout=-1)
except ra.ArgumentError:
    time.sleep({TIMEOUT + 2})
"""
    done, _ = launch(tmp_path, program)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_a_rank_that_comes_late(tmp_path: Path) -> None:
    """It may have a model to read first."""
    done, _ = launch(tmp_path, BEFORE.format(body=f"time.sleep({TIMEOUT + 2})"))
    assert done.returncode == 0 and done.stderr == "", done.stderr
