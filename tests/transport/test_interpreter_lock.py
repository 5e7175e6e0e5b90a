"""Under `ringattn launch`, a rank that computes in a call that keeps Python's global interpreter lock is not dead."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from spawn import ROOT, free_ports, under_load

pytestmark = pytest.mark.ranks

TIMEOUT = 2
STARTING = 3  # s for Python and MLX to start, with others at work on the machine
START = f"""
import ctypes, os, signal, subprocess, sys, time
import mlx.core as mx
import ringattn as ra

def compute(seconds):
    "Keep the lock for that long, as a long call into a regular expression or into the arithmetic of large integers."
    sys.setswitchinterval(1000)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    sys.setswitchinterval(0.005)

def later(seconds, name):
    "Have another process send this one a signal."
    subprocess.Popen(["sh", "-c", f"sleep {{seconds}}; kill -{{name}} {{os.getpid()}}"])

TIMEOUT = {TIMEOUT}
rank = int(os.environ["RINGATTN_RANK"])
"""


def launch(folder: Path, program: str, ranks: int = 2) -> tuple[subprocess.CompletedProcess, float]:
    path = folder / "program.py"
    path.write_text(START + program)
    line = [sys.executable, "-m", "ringattn.cli", "launch", "-n", str(ranks), "--timeout", str(TIMEOUT), str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    begin = time.monotonic()
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    return done, time.monotonic() - begin


COMPUTING = {
    "while a message to it is under way": """
with ra.init() as ring:
    ring.barrier()
    with ring.call("ring_attention"), ring.break_ring_on_error():
        if ring.rank == 1:
            into = memoryview(bytearray(32 << 20))
            message = ring.recv([into], tag=0)
            time.sleep(0.5)  # let a heartbeat say so
            compute(2.5 * TIMEOUT)
        else:
            message = ring.send(lambda: [memoryview(bytes(32 << 20))], tag=0)
        ring.wait(message)
""",
    "in a part of the ring": """
with ra.init() as ring:
    with ring.split(min(ring.rank, 1)) as part:
        if ring.rank == 2: compute(2.5 * TIMEOUT)
        part.barrier()
""",
    "in a ring of mx.distributed": """
os.environ.update(MLX_RANK=str(rank), MLX_HOSTFILE="hosts")
with ra.init("mlx") as ring:
    ring.barrier()
    if ring.rank == 1: compute(2.5 * TIMEOUT)
    ring.barrier()
""",
}


@pytest.mark.parametrize("when", COMPUTING)
def test_a_rank_that_computes_is_alive(tmp_path: Path, when: str) -> None:
    ranks = 3 if when == "in a part of the ring" else 2
    (tmp_path / "hosts").write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(ranks)]))
    done, seconds = launch(tmp_path, COMPUTING[when], ranks)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert seconds > 2.5 * TIMEOUT


SILENT = {
    "stopped while it computes": (3, "later(3, 'STOP'); compute(60)"),
    "blocked with the lock": (0, "ctypes.PyDLL(None).sleep(60)"),
}


@pytest.mark.parametrize("how", SILENT)
def test_a_rank_that_does_nothing_is_dead(tmp_path: Path, how: str) -> None:
    after, body = SILENT[how]
    program = f"with ra.init() as ring:\n    ring.barrier()\n    if rank == 1: {body}\n    ring.barrier()\n"
    done, seconds = launch(tmp_path, program)
    assert done.returncode not in (0, None), done.stderr
    assert after + TIMEOUT < seconds < after + under_load(TIMEOUT + 5 + STARTING), done.stderr
    assert re.search(r"RingError: rank 1 \(.+\) gave no sign of life for 2 s", done.stderr), done.stderr
