"""A rank stops or raises while blocks travel between GPUs: the others are told, and end their transfers."""

from __future__ import annotations

import re

import pytest
from spawn import ROOT
from test_faults import error_lines, run

pytestmark = pytest.mark.ranks

HOPS = f"""
sys.path.insert(0, {str(ROOT / "tests")!r})
from host_network import use_host_network
from ringattn.transport.interface import DeviceBuffer
network = use_host_network(ring)

def gpu_hops(count, at):
    links = ring.connect_gpus()
    memory = mx.zeros(100)
    place = links.gpu.locate([memory])[1]()[0]
    with ring.call("ring_attention"), ring.break_ring_on_error():
        for hop in range(count):
            ring.set_progress("ring_attention", hop)
            at(hop)
            sent = links.send(lambda: [DeviceBuffer(place, 40, memory)], tag=hop)
            arrived = links.recv(lambda: [DeviceBuffer(place + 200, 40, memory)], tag=hop)
            links.advance()
            ring.wait(sent, arrived)

def report(at):
    try:
        report_error(lambda: gpu_hops(6, at))
    finally:
        print(f"aborted: {{network.aborted}}", flush=True)
"""


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("os.kill(os.getpid(), signal.SIGSTOP)", r"rank 1 \(.*\) gave no sign of life for 3 s.*ring_attention, hop 3"),
        ("raise ValueError('only here')", r"rank 1 \(.*\) failed in ring_attention, hop 3: ValueError: only here"),
    ],
)
def test_a_rank_is_lost(fault: str, text: str) -> None:
    program = f"""
def at(hop):
    if ring.rank == 1 and hop == 3:
        time.sleep(0.7)  # let a heartbeat say where
        {fault}
report(at)
"""
    result = run(3, HOPS + program, ring_timeout=3)
    errors = error_lines(result)
    assert len(errors) == 2 and all(re.search(text, error) for error in errors), str(result)
    assert result.output.count("aborted: True") == 2 + ("raise" in fault), str(result)
    assert result.seconds < 3 + 5, str(result)
