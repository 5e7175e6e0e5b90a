"""A link on which one block takes longer than the timeout: it is slow, and everybody lives."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from spawn import ROOT

from launch.virtual import Cluster

pytestmark = pytest.mark.hosts

PROGRAM = """
import mlx.core as mx
import ringattn as ra
with ra.init() as ring:
    layout = ra.Layout.contiguous(2 * 4096, 2)
    x = mx.ones((1, 8, 4096, 128))
    out = ra.ring_attention(x[:, :, :64], x, x, ring=ring, layout=ra.Layout.contiguous(2 * 64, 2, start=8192),
                            kv_layout=layout, strategy="pass_kv")
    total = ring.all_reduce(mx.ones((8 << 20) // 4))
    print("right" if mx.allclose(out, mx.ones_like(out)) and total[-1].item() == 2 else "wrong")
"""


def test_a_block_slower_than_the_timeout(tmp_path: Path) -> None:
    """16.8 MB of keys take 2.7 s at 50 Mbit/s, in which no heartbeat gets by."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    with Cluster(2, rate="50mbit") as cluster:
        line = [sys.executable, "-m", "ringattn.cli", "launch", "--hosts", ",".join(cluster.addresses)]
        environment = {**cluster.environment, "PYTHONPATH": str(ROOT)}
        cluster.environment = environment
        done = cluster.run([*line, "--timeout", "1.5", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert (done.returncode, sorted(done.stdout.splitlines())) == (0, ["[0] right", "[1] right"]), done.stderr
