"""Faults over mx.distributed, whose calls cannot be interrupted: each rank ends by itself and names the cause."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from spawn import ROOT, Result, spawn_mlx, under_load
from test_faults import START, since_ready

pytestmark = pytest.mark.ranks

LAUNCH = Path(sys.executable).with_name("mlx.launch")
TIMEOUT = 3  # s of silence
STARTING = 3  # s in which Python and MLX start on a busy machine

ENDS = {
    "killed": "time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)",  # after a heartbeat with its place
    "stopped": "time.sleep(0.5); os.kill(os.getpid(), signal.SIGSTOP)",
    "raises": "raise ValueError('boom')",
    "exits": "os._exit(0)",
}
CAUSES = {
    "killed": r"rank 1 \(.+\) died: its connection was closed; it was last heard of in ring_attention, hop 3",
    "stopped": r"rank 1 \(.+\) gave no sign of life for 3 s; it was last heard of in ring_attention, hop 3",
    "raises": r"rank 1 \(.+\) failed in ring_attention, hop 3: ValueError: boom",
    "exits": r"rank 1 \(.+\) died: its connection was closed",
}


def run(program: str, *, timeout: float = TIMEOUT, **options) -> list[Result]:
    begin = time.time()
    results = spawn_mlx(3, ["-c", START.format(timeout=timeout) + program], timeout=30, **options)
    return since_ready(results, begin)


def text(results: list[Result]) -> str:
    return "\n".join(map(str, results))


def assert_cause(results: list[Result], cause: str, bad: int = 1) -> None:
    """Assert that all ranks but the bad one ended in time, with an error code and the cause in their output."""
    for rank, result in enumerate(results):
        if rank != bad:
            assert result.code not in (0, None), text(results)
            assert result.seconds < under_load(TIMEOUT + 5 + STARTING), text(results)
            assert re.search(cause, result.output), text(results)


@pytest.mark.parametrize(("how", "one_way"), [*((how, "") for how in ENDS), ("killed", "1")])
def test_a_rank_in_a_hop(how: str, one_way: str) -> None:
    program = f"""
def end(hop):
    if ring.rank == 1 and hop == 3:
        {ENDS[how]}
report_error(lambda: hops(6, end))
"""
    results = run(program, env={"RINGATTN_MLX_ONE_WAY": one_way}, but=[1])
    assert_cause(results, CAUSES[how])
    lines = re.findall("error: (.*)", text([r for i, r in enumerate(results) if i != 1]))
    assert len(lines) == 2 and all(line.startswith("rank=1 ") for line in lines), text(results)


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_rank_in_a_gather(how: str) -> None:
    program = f"if ring.rank == 1: {ENDS[how]}\nelse: report_error(ring.barrier)"
    assert_cause(run(program, but=[1]), r"rank 1 \(.+\) (died|gave no sign of life)")


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_rank_in_a_gather_of_the_graph(how: str) -> None:
    """The thread that evaluates the graph is in a call that may never return."""
    program = f"""
import ringattn as ra
if ring.rank == 1: {ENDS[how]}
x = mx.ones((1, 2, 8, 16))
out = ra.decode_attention(x[:, :, :1], x, x, ring=ring, kv_layout=ra.Layout.contiguous(24, 3), backend="reference")
mx.eval(out)
print("done", flush=True)
"""
    results = run(program, but=[1])
    assert_cause(results, r"ringattn: .*rank 1 \(.+\) (died|gave no sign of life)")
    assert "done" not in text(results)


STUCK = {
    "message": ("recv", "hops(6)", r"\d+ bytes (to|from) rank [012] \(.+\) are stuck in ring_attention, hop \d"),
    "round": ("gather", "ring.barrier()", r"a round is stuck: all ranks have been in it for 3 s"),
}


@pytest.mark.parametrize("what", STUCK)
def test_a_stuck_link_while_heartbeats_arrive(what: str) -> None:
    """A pulled cable, where heartbeats take another way."""
    name, call, cause = STUCK[what]
    program = f"""
from ringattn.transport.mlx.backend import Group
ring.barrier()
if ring.rank == 1: Group.{name} = lambda *_: time.sleep(60)
report_error(lambda: {call})
"""
    assert_cause(run(program), cause, bad=-1)


def test_a_rank_that_leaves() -> None:
    results = run("if ring.rank == 1: sys.exit(0)\nelse: report_error(ring.barrier)")
    assert_cause(results, r"rank 1 \(.+\) left the ring while rank [02] waited for it in barrier, hop 0")


def test_a_rank_that_stops_while_others_exit() -> None:
    results = run("hops(2)\nif ring.rank == 1: os.kill(os.getpid(), signal.SIGSTOP)", but=[1])
    for rank in (0, 2):
        assert results[rank].code not in (0, None), text(results)
        assert results[rank].seconds < under_load(TIMEOUT + 5 + STARTING), text(results)


def test_a_long_computation_is_no_stall() -> None:
    program = "hops(2); ring.rank == 1 and time.sleep(3); hops(2); ring.barrier()\nif ring.rank == 0: time.sleep(2)"
    results = run(program, timeout=1)
    assert [result.code for result in results] == [0, 0, 0], text(results)


def test_interrupted_rank() -> None:
    program = """
if ring.rank == 1:
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    ring.barrier()
elif ring.rank == 0:
    time.sleep(4)  # long enough for the signal on a busy machine
report_error(ring.barrier)
"""
    assert_cause(run(program), r"rank 1 \(.+\) failed in barrier, hop 0: KeyboardInterrupt")


def test_under_mlx_launch() -> None:
    """The real launcher: a program runs, and a rank that raises ends the others."""
    shows = "print(f'{ring.rank} of {ring.size}\\n', end='', flush=True)"  # one write
    program = f"import ringattn as ra\nring = ra.init()\n{shows}\nring.barrier()\n"
    for ending, expected in (("", False), ("if ring.rank == 1: raise ValueError('boom')\nring.barrier()", True)):
        options = ["-n", "2", "--backend", "ring", "--env", f"PYTHONPATH={ROOT}"]
        command = [str(LAUNCH), *options, "--", sys.executable, "-c", program + ending]
        shown = output(command)
        assert "0 of 2" in shown and "1 of 2" in shown, shown
        assert ("ValueError: boom" in shown) == expected, shown


MPI = "from mpi4py import MPI\n"
UNUSABLE = {
    "no launcher": ({}, "", "start with mlx.launch"),
    "no file of hosts": ({"MLX_HOSTFILE": "/nowhere"}, "", "MLX_HOSTFILE: '/nowhere' cannot be read"),
    "nccl": ({"NCCL_HOST_IP": "127.0.0.1", "MLX_WORLD_SIZE": "2"}, "", "NCCL has no send and receive"),
    "no jaccl": ({"MLX_IBV_DEVICES": "HOSTS", "MLX_RANK": "0"}, "", "this build of MLX has no backend 'jaccl'"),
    "mpi": ({"MLX_HOSTFILE": "HOSTS", "MLX_RANK": "0"}, MPI, "this process has started MPI"),
}


@pytest.mark.parametrize("why", UNUSABLE)
def test_unusable_is_one_line(why: str, tmp_path: Path) -> None:
    env, prologue, message = UNUSABLE[why]
    if prologue:
        pytest.importorskip("mpi4py")
    hosts = tmp_path / "hosts"
    hosts.write_text('[["127.0.0.1:1"], ["127.0.0.1:2"]]')
    shown = output([sys.executable, "-c", f"{prologue}from ringattn.transport import init\ninit('mlx')"], {
        name: str(hosts) if value == "HOSTS" else value for name, value in env.items()
    })  # fmt: skip
    last = shown.strip().splitlines()[-1]
    assert last.startswith("ringattn.errors.RingError: ") and message in last, shown


def test_mpi_after_mlx_is_one_line() -> None:
    results = run("init('mpi')")
    assert "RingError: backend 'mpi': this process is connected by mx.distributed" in results[0].output, text(results)


def test_one_process_needs_no_peer(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("")
    program = "from ringattn.transport import init; ring = init(); print(type(ring).__name__, ring.size)"
    env = {"MLX_RANK": "0", "MLX_HOSTFILE": str(tmp_path / "hosts")}
    assert output([sys.executable, "-c", program], env) == "SoloRing 1\n"


def output(command: list[str], env: dict[str, str] | None = None) -> str:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MLX_")}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**inherited, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=30,
        check=False,
    )
    return done.stdout
