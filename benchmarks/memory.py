"""Memory of a rank: its growth in a call against the allowed growth, and a problem that fits no single process."""

from __future__ import annotations

import sys

import mlx.core as mx
import numpy as np

import ringattn as ra
from launch.virtual import Cluster, unavailable
from ringattn.bench.memory import PeakMemory

from .common import chunk_of, run_ranks, sampled_error, show, write_result

RANKS = 4
TOKENS, HEADS, DIM = 16384, 16, 128
LONG = 32768  # tokens
HOSTS = 8
LIMIT = 500 << 20  # bytes of memory of a host


def main() -> None:
    """Measure and print both."""
    block = TOKENS // RANKS * HEADS * DIM * 4
    out = block + block // DIM
    state = block + 2 * block // DIM
    rows = []
    for what, holds, allowed in (
        ("forward", "out, lse, state, two blocks", out + state + 2 * 2 * block),
        ("and gradient", "out, lse, dq, dk, dv, two blocks with gradients", out + 3 * block + 2 * 4 * block),
    ):
        growth = max(one["growth"] for one in run_ranks("benchmarks.memory", RANKS, 1, TOKENS, what))
        rows.append([what, f"{growth / 1e6:.0f}", f"{allowed / 1e6:.0f}", f"{growth / allowed:.2f}", holds])
    title = f"{TOKENS} tokens x {HEADS} heads x {DIM}, {RANKS} ranks: growth of a rank in a call (aim: at most 1.10)"
    show(title, ["what", "grown MB", "allowed MB", "ratio", "allowed is"], rows)
    _on_small_hosts()


def _on_small_hosts() -> None:
    """Run a problem on the virtual cluster whose keys and values fit in no host's memory."""
    if why := unavailable():
        print(f"  not tried: {why}")
        return
    rows = []
    held = 2 * LONG * HEADS * DIM * 4
    for hosts in (1, HOSTS):
        with Cluster(hosts, memory=f"{LIMIT >> 20}M") as cluster:
            options = {"hosts": cluster.addresses, "base": cluster.environment, "expect_failure": hosts == 1}
            found = run_ranks("benchmarks.memory", hosts, 1, LONG, "forward", **options)
        result = "failed" if found is None else f"finished, largest error {max(one['error'] for one in found):.1e}"
        rows.append([f"{hosts} hosts" if hosts > 1 else "1 host", result])
    title = f"{LONG} tokens, keys and values of {held / 1e6:.0f} MB, hosts with {LIMIT / 1e6:.0f} MB of memory each"
    show(title, ["", "result"], rows)


def worker() -> None:
    """Measure on one rank, which draws only its own tokens."""
    tokens = int(sys.argv[2])
    mx.set_default_device(mx.cpu)
    with ra.init() as ring:
        layout = ra.Layout.zigzag(tokens, ring.size)
        tensors = [mx.zeros((1, HEADS, layout.local_length(ring.rank), DIM)) for _ in "qkv"]
        mx.eval(tensors)
        for name, x in zip("qkv", tensors):
            view = np.array(x, copy=False)
            before = 0
            for start, stop in layout.spans[ring.rank]:
                for first in range(start, stop, 1024):
                    last = min(first + 1024, stop)
                    view[0, :, before : before + last - first] = chunk_of(name, first, last, HEADS, DIM)
                    before += last - first
        _warm_up(ring)

        def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            return ra.ring_attention(q, k, v, ring=ring, layout=layout, mask="causal")

        memory = PeakMemory()
        if sys.argv[3] == "forward":
            out = attend(*tensors)
        else:  # the gradient of the loss by `out` is q itself
            (out,), gradients = mx.vjp(attend, tensors, tensors[:1])
            mx.eval(gradients)
        growth = memory.growth()
        error = sampled_error(np.array(out[0], copy=False), layout.positions(ring.rank), tokens, DIM, causal=True)
        assert error < 1e-5, error
        write_result(ring.rank, {"growth": growth, "error": error})


def _warm_up(ring: ra.Ring) -> None:
    """Start threads, libraries and connections, which take memory in the first call of any size."""
    layout = ra.Layout.zigzag(1024, ring.size)
    x = mx.random.normal((1, 1, layout.local_length(ring.rank), DIM))
    mx.eval(mx.grad(lambda x: ra.ring_attention(x, x, x, ring=ring, layout=layout, mask="causal").sum())(x))


if __name__ == "__main__":
    worker()
