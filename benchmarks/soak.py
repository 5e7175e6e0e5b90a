"""Growth of memory over mixed calls on 4 ranks, with every answer checked: ``python -m benchmarks.soak MINUTES``.

Calls are of every kind and of random sizes. A rank's growth is its memory at the end less its memory after a quarter of
the time.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

import ringattn as ra

from .common import run_ranks, show, write_result

RANKS = 4
INTERVAL = 10.0  # s between two measurements of the memory


def main(minutes: float) -> None:
    """Run the calls, and print the memory of every rank over time."""
    found = run_ranks("benchmarks.soak", RANKS, 1, minutes)
    assert found is not None
    marks = [0.25, 0.5, 0.75, 1.0]
    rows = []
    for rank, (calls, memory) in enumerate(found):
        held = [memory[min(int(part * len(memory)), len(memory) - 1)] for part in marks]
        rows.append([rank, calls, *(f"{x:.1f}" for x in held), f"{held[-1] - held[0]:+.1f}"])
    head = ["rank", "calls", *(f"MB at {part:.0%}" for part in marks), "grown since 25%"]
    show(f"{minutes:g} minutes of mixed calls, {RANKS} ranks", head, rows)


def worker() -> None:
    """Run the calls on one rank. Write their number, and the resident memory in MB at intervals."""
    minutes = float(sys.argv[2])
    calls = 0
    memory: list[float] = []
    mx.set_default_device(mx.cpu)
    random = np.random.default_rng(0)  # the same on every rank
    with ra.init() as ring:
        begin = time.monotonic()
        while True:
            now = (time.monotonic() - begin) / 60
            if bool(ring.broadcast(mx.array([now >= minutes]) if ring.rank == 0 else None).item()):
                break
            KINDS[int(random.integers(len(KINDS)))](ring, random)
            calls += 1
            if time.monotonic() - begin > INTERVAL * (len(memory) + 1):
                memory.append(_resident())
        write_result(ring.rank, [calls, [*memory, _resident()]])


def _resident() -> float:
    """Resident memory of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def _problem(ring: ra.Ring, random: np.random.Generator) -> tuple[ra.Layout, list[mx.array]]:
    tokens, heads, dim = (int(random.integers(*span)) for span in ((1, 700), (1, 4), (8, 80)))
    layout = [ra.Layout.zigzag, ra.Layout.contiguous][int(random.integers(2))](tokens, ring.size)
    shapes = [(1, 2 * heads, tokens, dim), *[(1, heads, tokens, dim)] * 2]
    return layout, [mx.array(random.standard_normal(shape, np.float32)) for shape in shapes]


def _attend(ring: ra.Ring, random: np.random.Generator) -> None:
    layout, whole = _problem(ring, random)
    options = {"mask": ["causal", None][int(random.integers(2))], "strategy": [None, "pass_q"][int(random.integers(2))]}
    own = [layout.shard(x, ring.rank) for x in whole]
    found = ra.ring_attention(*own, ring=ring, layout=layout, **options)
    expected = ra.attention(*whole, mask=options["mask"], backend="reference")
    _close(found, layout.shard(expected, ring.rank))


def _gradient(ring: ra.Ring, random: np.random.Generator) -> None:
    layout, whole = _problem(ring, random)
    own = [layout.shard(x, ring.rank) for x in whole]
    found = mx.grad(lambda *x: ra.ring_attention(*x, ring=ring, layout=layout, mask="causal").sum(), (0, 1, 2))(*own)
    alone = mx.grad(lambda *x: ra.attention(*x, mask="causal", backend="reference").sum(), (0, 1, 2))(*whole)
    for x, y in zip(found, alone):
        _close(x, layout.shard(y, ring.rank))


def _decode(ring: ra.Ring, random: np.random.Generator) -> None:
    layout, (q, k, v) = _problem(ring, random)
    own = [layout.shard(x, ring.rank) for x in (k, v)]
    found = ra.decode_attention(q[:, :, -1:], *own, ring=ring, kv_layout=layout)
    _close(found, ra.attention(q[:, :, -1:], k, v, mask="causal", backend="reference"))


def _move(ring: ra.Ring, random: np.random.Generator) -> None:
    layout, (x, *_) = _problem(ring, random)
    assert bool(mx.array_equal(layout.gather(layout.shard(x, ring.rank), ring), x))
    root = int(random.integers(ring.size))
    assert bool(mx.array_equal(ring.broadcast(x if ring.rank == root else None, root), x))
    _close(ring.all_reduce(x), x * ring.size)


def _split(ring: ra.Ring, random: np.random.Generator) -> None:
    with ring.split(ring.rank % 2) as half:
        _attend(half, random)


KINDS = (_attend, _attend, _gradient, _decode, _decode, _move, _split)


def _close(found: mx.array, expected: mx.array) -> None:
    error = float(mx.abs(found - expected).max().item()) if found.size else 0.0
    scale = max(1.0, float(mx.abs(expected).max().item()) if expected.size else 0.0)
    if not error < 1e-4 * scale:
        raise AssertionError(f"error {error}")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        worker()
    else:
        main(float(sys.argv[1]) if len(sys.argv) > 1 else 30.0)
