"""Memory of a rank: how far it grows in a call against what it may, and a problem that fits no single process."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

import ringattn as ra

from .common import chunk_of, run_ranks, sampled_error, show, write_result
from .peak import PeakMemory

RANKS, TOKENS, HEADS, DIM = 4, 16384, 16, 128
CGROUPS = Path("/sys/fs/cgroup")


def main() -> None:
    """Both figures."""
    block, rows = TOKENS // RANKS * HEADS * DIM * 4, []
    out, state = block + block // DIM, block + 2 * block // DIM
    for what, holds, allowed in (
        ("forward", "out, lse, state, two blocks", out + state + 2 * 2 * block),
        ("and gradient", "out, lse, dq, dk, dv, two blocks with gradients", out + 3 * block + 2 * 4 * block),
    ):
        growth = max(one["growth"] for one in run_ranks("benchmarks.memory", RANKS, 1, "none", what))
        rows.append([what, f"{growth / 1e6:.0f}", f"{allowed / 1e6:.0f}", f"{growth / allowed:.2f}", holds])
    title = f"{TOKENS} tokens x {HEADS} heads x {DIM}, {RANKS} ranks: growth of a rank in a call (aim: at most 1.10)"
    show(title, ["what", "grown MB", "allowed MB", "ratio", "allowed is"], rows)
    whole = 5 * RANKS * block  # q, k, v, out and state of the whole sequence
    with _cgroup(limit := int(0.75 * whole)) as group:
        if group is None:
            print("  no memory cgroup can be made here: the hard way was not tried")
            return
        alone = run_ranks("benchmarks.memory", 1, 2, group, "forward", expect_failure=True)
        together = run_ranks("benchmarks.memory", RANKS, 1, group, "forward")
        rows = [["1 process", "failed" if alone is None else "finished"], [f"{RANKS} ranks", _told(together)]]
        show(f"each process limited to {limit / 1e6:.0f} MB, q, k, v, out and state take {whole / 1e6:.0f} MB",
             ["", "result"], rows)  # fmt: skip


def _told(found: list) -> str:
    return f"finished, largest error {max(one['error'] for one in found):.1e}"


@contextlib.contextmanager
def _cgroup(limit: int) -> Iterator[str | None]:
    """A folder in which each process makes a memory cgroup of its own with this limit; ``None`` where none can be."""
    for parent, name in ((CGROUPS / "memory", "memory.limit_in_bytes"), (CGROUPS, "memory.max")):
        group = parent / f"ringattn-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            yield f"{group}:{name}:{limit}" if (group / name).exists() else None
        finally:
            for inner in [*group.glob("*/"), group]:
                inner.rmdir()
        return
    yield None


def _enter(told: str) -> None:
    """Move this process into a cgroup of its own."""
    if told == "none":
        return
    group, name, limit = told.split(":")
    own = Path(group) / str(os.getpid())
    own.mkdir()
    (own / name).write_text(limit)
    (own / "cgroup.procs").write_text(str(os.getpid()))


def worker() -> None:
    """One rank: only its own tokens are ever made."""
    _enter(sys.argv[2])
    mx.set_default_device(mx.cpu)
    with ra.init() as ring:
        layout = ra.Layout.zigzag(TOKENS, ring.size)
        tensors = [mx.zeros((1, HEADS, layout.local_length(ring.rank), DIM)) for _ in "qkv"]
        mx.eval(tensors)
        for name, x in zip("qkv", tensors):
            view, before = np.array(x, copy=False), 0
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
        error = sampled_error(np.array(out[0], copy=False), layout.positions(ring.rank), TOKENS, DIM, causal=True)
        assert error < 1e-5, error
        write_result(ring.rank, {"growth": growth, "error": error})


def _warm_up(ring: ra.Ring) -> None:
    """Threads, libraries and connections: what the first call costs whatever its size."""
    layout = ra.Layout.zigzag(1024, ring.size)
    x = mx.random.normal((1, 1, layout.local_length(ring.rank), DIM))
    mx.eval(mx.grad(lambda x: ra.ring_attention(x, x, x, ring=ring, layout=layout, mask="causal").sum())(x))


if __name__ == "__main__":
    worker()
