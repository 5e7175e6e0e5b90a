"""What happens when a rank stops, dies, leaves or raises: the others are told who, where and why, and nobody hangs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from spawn import ROOT, Result, spawn, under_load

from ringattn.transport.failures.status_file import FILE_BYTES, LINE_BYTES

pytestmark = pytest.mark.ranks


START = """
import os, signal, sys, threading, time
import mlx.core as mx
from ringattn.transport import init
from ringattn.errors import RingError
ring = init(timeout={timeout})
begin = time.monotonic()
print(f"ready: {{time.time()}}", flush=True)

def hops(count, at=lambda hop: None):
    "Pass blocks round the ring as an attention call does."
    with ring.call("ring_attention"), ring.break_ring_on_error():
        block = memoryview(bytes(100_000))
        for hop in range(count):
            ring.set_progress("ring_attention", hop)
            at(hop)
            into = memoryview(bytearray(100_000))
            ring.wait(ring.send(lambda: [block], tag=hop), ring.recv([into], tag=hop))

def report_error(work):
    try:
        work()
    except RingError as error:
        print(f"error: rank={{error.rank}} hop={{error.hop}} host={{bool(error.host)}} text={{error}}", flush=True)
        try:
            ring.barrier()
        except RingError as again:
            assert str(again) == str(error)
        raise
"""


def run(size: int, program: str, *, ring_timeout: float = 20, timeout: float = 40, **options) -> Result:
    begin = time.time()
    result = spawn(size, ["-c", START.format(timeout=ring_timeout) + program], timeout=timeout, **options)
    return since_ready([result], begin)[0]


def since_ready(results: list[Result], begin: float) -> list[Result]:
    """Count the seconds of `results` from when the last rank was ready: on a busy machine Python starts late."""
    ready = [float(seconds) for result in results for seconds in re.findall(r"ready: (\d+\.\d+)", result.output)]
    late = max(ready, default=begin) - begin
    return [result._replace(seconds=result.seconds - late) for result in results]


def error_lines(result: Result) -> list[str]:
    return re.findall(r"error: (.*)", result.output)


@pytest.mark.parametrize("net", ["shared memory", "tcp"])
def test_stopped_rank(net: str) -> None:
    program = """
def stop(hop):
    if ring.rank == 1 and hop == 3:
        time.sleep(0.5)  # let a heartbeat say where
        os.kill(os.getpid(), signal.SIGSTOP)
report_error(lambda: hops(6, stop))
"""
    env = {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp", "MPIR_CVAR_NOLOCAL": "1"} if net == "tcp" else {}
    result = run(4, program, ring_timeout=3, timeout=20, env=env)
    assert result.seconds < under_load(3 + 5 + 2), str(result)  # the last 2 are for starting Python
    lines = error_lines(result)
    assert len(lines) == 3, str(result)
    for line in lines:
        assert re.match(r"rank=1 hop=3 host=True text=rank 1 \(.+\) gave no sign of life for 3 s; ", line), str(result)
        assert "; it was last heard of in ring_attention, hop 3. It stopped or is out of reach, or a call kept" in line
        assert line.endswith("kept Python's global interpreter lock for that long: then raise timeout"), str(result)
    assert re.search(r"ringattn: rank 0 \(.+\) failed in ring_attention, hop \d: RingError: rank 1 \(", result.output)


def test_all_stopped_and_continued(tmp_path: Path) -> None:
    """A machine that was suspended: everybody was silent for longer than the timeout, and nobody is dead."""
    program = f"open({str(tmp_path)!r} + f'/{{os.getpid()}}', 'w'); hops(50, lambda hop: time.sleep(0.05)); hops(5)"

    def pause() -> None:
        end = time.monotonic() + 15
        while len(paused := [int(file.name) for file in tmp_path.iterdir()]) < 3:
            assert time.monotonic() < end
            time.sleep(0.05)
        time.sleep(0.5)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in paused:
                os.kill(pid, number)
            time.sleep(3)

    result = run(3, program, ring_timeout=1.5, timeout=30, meanwhile=pause)
    assert result.code == 0, str(result)


@pytest.mark.parametrize("how", ["in a call", "between calls"])
def test_rank_that_raises(how: str) -> None:
    program = """
def bad(hop):
    if ring.rank == 2 and hop == 2:
        raise ValueError("boom")
"""
    in_call, between = "report_error(lambda: hops(4, bad))", "hops(2); bad(2); report_error(lambda: hops(4))"
    result = run(3, program + (in_call if how == "in a call" else between))
    assert result.code not in (0, None) and result.seconds < under_load(8), str(result)
    where = "in ring_attention, hop 2" if how == "in a call" else "after ring_attention"
    lines = error_lines(result)
    assert len(lines) == 2, str(result)
    for line in lines:
        expected = rf"rank=2 hop=\d host=True text=rank 2 \(.+\) failed {where}: ValueError: boom$"
        assert re.search(expected, line), str(result)
    assert re.search(rf"ringattn: rank 2 \(.+\) failed {where}: ValueError: boom", result.output), str(result)
    assert result.output.count("Traceback") >= 3, str(result)


@pytest.mark.parametrize("leave", ["sys.exit(0)", "ring.close(); time.sleep(30)"])
def test_rank_that_leaves(leave: str) -> None:
    result = run(3, f"if ring.rank == 1: {leave}\nelse: report_error(ring.barrier)")
    assert result.code not in (0, None) and result.seconds < under_load(8), str(result)
    lines = error_lines(result)
    assert len(lines) == 2, str(result)
    for line in lines:
        assert re.search(r"text=rank 1 \(.+\) left the ring while rank [02] waited for it in barrier, hop 0$", line)


def test_last_words_of_a_rank_that_leaves() -> None:
    """What a rank sent before it left still arrives."""
    program = """
tag = 5
if ring.rank == 0:
    ring.wait(ring.send(lambda: [memoryview(bytes(3_000))], tag=tag))
elif ring.rank == 1:
    time.sleep(1)
    ring.wait(ring.recv([memoryview(bytearray(3_000))], tag=tag))
"""
    result = run(3, program)
    assert result.code == 0, str(result)


def test_long_computation_is_no_stall() -> None:
    program = "hops(2); ring.rank == 1 and time.sleep(4); hops(2); ring.barrier()\nif ring.rank == 0: time.sleep(3)"
    result = run(3, program, ring_timeout=1)
    assert result.code == 0, str(result)


def test_killed_rank(tmp_path: Path) -> None:
    program = """
def die(hop):
    if ring.rank == 1 and hop == 3:
        os.kill(os.getpid(), signal.SIGKILL)
hops(6, die)
"""
    marker = tmp_path / "status"
    marker.write_bytes(b"")
    prologue = f"import os\nif os.environ.get('PMI_RANK') == '1': os.environ['RINGATTN_STATUS'] = {str(marker)!r}\n"
    source = prologue + START.format(timeout=20) + program
    result = spawn(3, ["-c", source], timeout=30)
    assert result.code not in (0, None) and result.seconds < under_load(8), str(result)
    status = marker.read_bytes()
    assert len(status) == FILE_BYTES
    known = {"rank": 1, "size": 3, "call": "ring_attention", "hop": 3}
    assert json.loads(status[:LINE_BYTES].rstrip(b"\0")) == known


def test_interrupted_rank() -> None:
    program = """
if ring.rank == 1:
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    ring.barrier()
elif ring.rank == 0:
    time.sleep(1.5)
report_error(ring.barrier)
"""
    result = run(3, program)
    assert result.code not in (0, None) and result.seconds < under_load(8), str(result)
    assert re.search(r"text=rank 1 \(.+\) failed in barrier, hop 0: KeyboardInterrupt", result.output), str(result)


def test_rank_stopped_while_others_exit() -> None:
    """A finished rank waits for the others to finish, but not for a dead one."""
    program = "hops(2)\nif ring.rank == 1: os.kill(os.getpid(), signal.SIGSTOP)"
    result = run(3, program, ring_timeout=2, timeout=20)
    assert result.code not in (0, None) and result.seconds < under_load(2 + 5 + 2), str(result)


def test_failure_in_part_of_the_ring() -> None:
    program = """
part = ring.split(ring.rank % 2)
if ring.rank == 2: raise ValueError("boom")
report_error(part.barrier if ring.rank == 0 else ring.barrier)
"""
    result = run(4, program)
    assert result.code not in (0, None) and result.seconds < under_load(8), str(result)
    assert "text=rank 1 (" in result.output, str(result)  # in the part, which has its own ranks
    assert re.search(r"ringattn: rank 2 \(.+\) failed after split: ValueError: boom", result.output), str(result)


@pytest.mark.parametrize(
    ("prologue", "message"),
    [
        ("sys.modules['mpi4py'] = None", "pip install 'ringattn[mpi]'"),
        ("import mpi4py; mpi4py.rc.thread_level = 'single'; from mpi4py import MPI", "MPI_THREAD_MULTIPLE"),
    ],
)
def test_unusable_mpi_is_one_line(prologue: str, message: str) -> None:
    if "rc" in prologue:
        pytest.importorskip("mpi4py")
    program = f"import sys\n{prologue}\nfrom ringattn.transport import init\ninit('mpi')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ringattn.errors.RingError: ") and message in last, done.stderr


def test_importing_does_not_start_mpi() -> None:
    program = "import sys; from ringattn.transport import init, mpi; init('solo'); sys.exit('mpi4py' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("how", ["leaves", "stops"])
def test_rank_that_takes_no_gradient(how: str) -> None:
    """The others wait for it in the gradient of `ring_attention`, and are told whom they wait for."""
    end = {"leaves": "ring.close()", "stops": "os.kill(os.getpid(), signal.SIGSTOP)"}[how]
    program = f"""
import ringattn as ra
layout = ra.Layout.contiguous(24, 3)
x = mx.ones((1, 2, 8, 16))
if ring.rank == 1:
    ra.ring_attention(x, x, x, ring=ring, layout=layout)
    {end}
else:
    report_error(lambda: mx.grad(lambda x: ra.ring_attention(x, x, x, ring=ring, layout=layout).sum())(x))
"""
    result = run(3, program, ring_timeout=2, timeout=20)
    lines = error_lines(result)
    assert result.seconds < under_load(8) and len(lines) == 2, str(result)
    where = "waited for it in the gradient of ring_attention" if how == "leaves" else "gave no sign of life for 2 s"
    assert all(line.startswith("rank=1 ") and where in line for line in lines), str(result)
