"""User's program under `ringattn launch`: the answer, and the message when a rank fails during a ring call."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ringattn.launcher.rank_wrapper import start_time

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]
TIMEOUT = 3

PROGRAM = """
import os, signal, sys, time
import mlx.core as mx
import ringattn as ra

mx.set_default_device(mx.cpu)
ring = ra.init()
open(os.path.join(sys.argv[1], f"pid-{ring.rank}"), "w").write(str(os.getpid()))
layout = ra.Layout.zigzag(3000, ring.size)
x = mx.random.normal((1, 4, layout.local_length(ring.rank), 64))

def fault(rank, hop):
    "What happens to `rank` when it comes to `hop`."
    at = ring.set_progress
    def wrapped(what, now):
        at(what, now)
        if ring.rank == rank and what == "ring_attention" and now == hop:
            FAULT
    ring.set_progress = wrapped

calls = 0
while True:
    out = ra.ring_attention(x, x, x, ring=ring, layout=layout, mask="causal", strategy="STRATEGY")
    calls += 1
    if calls == 3:
        open(os.path.join(sys.argv[1], f"running-{ring.rank}"), "w").close()
        fault(1, 2)
"""


def _start(folder: Path, fault: str, strategy: str = "pass_kv") -> subprocess.Popen[str]:
    program = folder / "program.py"
    program.write_text(PROGRAM.replace("FAULT", fault).replace("STRATEGY", strategy))
    line = [sys.executable, "-m", "ringattn.cli", "launch", "-n", "3", "--timeout", str(TIMEOUT), "--", str(program)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*line, str(folder)], text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def _wait_for(folder: Path, ranks: int = 3) -> None:
    end = time.monotonic() + 60
    while len(list(folder.glob("running-*"))) < ranks:
        assert time.monotonic() < end, "the ranks did not come to their third call"
        time.sleep(0.05)


def _ended(process: subprocess.Popen[str], folder: Path, limit: float) -> str:
    """Wait at most `limit` seconds for the end of all processes, and return the output."""
    try:
        output, _ = process.communicate(timeout=limit)
    finally:
        process.kill()
    notes = list(folder.glob("pid-*"))
    assert notes
    assert not [pid for pid in (int(note.read_text()) for note in notes) if start_time(pid)]  # a zombie has none
    return output


KILLED = "os.kill(os.getpid(), signal.SIGKILL)", r"rank 1 \(.+\) was killed by SIGKILL in ring_attention, hop 2"
STOPPED = "os.kill(os.getpid(), signal.SIGSTOP)", r"rank 1 \(.+\) gave no sign of life.+ring_attention, hop \d"
RAISES = "raise ValueError('a bug')", r"rank 1 \(.+\) failed in ring_attention, hop 2: ValueError: a bug"
EXITS = "os._exit(0)", r"rank 1"


@pytest.mark.parametrize(
    ("strategy", "fault", "message"),
    [("pass_kv", *KILLED), ("pass_kv", *STOPPED), ("pass_kv", *RAISES), ("pass_q", *RAISES), ("pass_q", *EXITS)],
    ids=["killed", "stopped", "raises", "raises in pass_q", "exits in pass_q"],
)
def test_fault_in_mid_ring(tmp_path: Path, strategy: str, fault: str, message: str) -> None:
    process = _start(tmp_path, fault, strategy)
    _wait_for(tmp_path)
    output = _ended(process, tmp_path, TIMEOUT + 5)
    assert process.returncode not in (0, None), output
    assert re.search(message, output), output


def test_ctrl_c_in_mid_ring(tmp_path: Path) -> None:
    process = _start(tmp_path, "pass")
    _wait_for(tmp_path)
    process.send_signal(signal.SIGINT)
    output = _ended(process, tmp_path, TIMEOUT + 5)
    assert process.returncode == 130, output


def test_quickstart() -> None:
    """Rank 0 alone prints, and it prints that the answer is right."""
    line = [sys.executable, "-m", "ringattn.cli", "launch", "-n", "3", "--", "examples/quickstart.py"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    sizes, difference = done.stdout.splitlines()
    assert sizes == "4096 tokens on 3 ranks, 1365 of them on rank 0: out (1, 8, 1365, 64), next (1, 8, 1, 64)"
    assert float(difference.removeprefix("Largest difference from one process: ")) < 1e-5


def test_verify() -> None:
    """The command finds kernels and a ring within their budgets."""
    line = [sys.executable, "-m", "ringattn.cli", "verify", "--ranks", "2"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all within budget" in done.stdout and "FAIL" not in done.stdout
