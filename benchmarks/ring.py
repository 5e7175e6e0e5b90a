"""Time of two ranks with one thread each, against one process with two threads, and the same work without a ring."""

from __future__ import annotations

import sys
from itertools import product
from statistics import median

import mlx.core as mx
import numpy as np

import ringattn as ra

from .common import chunk_of, medians, run_ranks, sampled_error, show, write_result

TOKENS, HEADS = 8192, 8
ROUNDS = 3


def main() -> None:
    """Measure both in turn, and compare the medians."""
    rows = []
    for what, dim, mask in product(("forward", "and gradient"), (64, 128), ("full", "causal")):
        seconds: dict[tuple[int, str], list[float]] = {}
        for _ in range(ROUNDS):
            for ranks in (1, 2):
                found = run_ranks("benchmarks.ring", ranks, 2 // ranks, dim, mask, what)
                for name in ("call", "alone"):
                    seconds.setdefault((ranks, name), []).append(max(one[name] for one in found))
        one, two, alone = (median(seconds[which]) for which in ((1, "call"), (2, "call"), (2, "alone")))
        rows.append([what, dim, mask, *(f"{x:.2f}" for x in (one, two, alone, one / two, alone / two))])
    head = ["what", "head_dim", "mask", "1 process x 2 threads, s", "2 ranks x 1 thread, s", "2 x 1 without a ring, s",
            "ring against 1 process", "ring against none"]  # fmt: skip
    show(f"{TOKENS} tokens, {HEADS} heads, float32 (aim: at least 0.95)", head, rows)


def worker() -> None:
    """Measure the median seconds of a call in one process."""
    dim = int(sys.argv[2])
    causal = sys.argv[3] == "causal"
    gradient = sys.argv[4] != "forward"
    mx.set_default_device(mx.cpu)
    with ra.init() as ring:
        layout = ra.Layout.zigzag(TOKENS, ring.size)
        q, k, v = (
            mx.array(np.concatenate([chunk_of(name, *span, HEADS, dim) for span in layout.spans[ring.rank]], 1)[None])
            for name in "qkv"
        )

        def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            return ra.ring_attention(q, k, v, ring=ring, layout=layout, mask="causal" if causal else None)

        def call() -> mx.array:
            ring.barrier()
            return attend(q, k, v)

        def backward() -> list[mx.array]:  # the gradient of the loss by `out` is q itself
            ring.barrier()
            found = mx.vjp(attend, [q, k, v], [q])[1]
            mx.eval(found)
            return found

        positions = layout.positions(ring.rank)
        error = sampled_error(np.array(call()[0]), positions, TOKENS, dim, causal=causal)
        assert error < 1e-5, error
        if gradient:
            error = _gradient_error(ring, q, backward(), positions, dim, causal)
            assert error < 1e-4, error
        timed = backward if gradient else call
        whole = without_ring(ring, layout, q, k, v, causal, gradient)
        write_result(ring.rank, medians({"call": timed, "alone": whole}, repeats=5 if gradient else 9))


def without_ring(ring: ra.Ring, layout: ra.Layout, q: mx.array, k: mx.array, v: mx.array, causal: bool, gradient: bool):
    """Call that computes the same scores with all keys in memory, on all ranks at once, each for its own queries."""
    places = mx.array(layout.positions(ring.rank)), mx.arange(layout.length)
    arrays = [q, *(layout.gather(x, ring) for x in (k, v))]
    mx.eval(arrays)

    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return ra.attention(q, k, v, positions=places, mask="causal" if causal else None)

    def call() -> None:
        ring.barrier()
        mx.eval(mx.vjp(attend, arrays, [q])[1] if gradient else attend(*arrays))

    return call


def _gradient_error(ring: ra.Ring, q: mx.array, found: list[mx.array], positions: np.ndarray, dim: int, causal: bool):
    """Largest error of some rows of dq against float64, and of the sum of all dv.

    The latter is the sum of all dout, since the weights of a query add up to 1.
    """
    picked = np.linspace(0, len(positions) - 1, 4).astype(int)
    at = positions[picked]
    rows = np.array(q[0])[:, picked].astype(np.float64)
    total, out, by_key, both = (np.zeros((HEADS, 4, n)) for n in (1, dim, dim, dim))
    for start in range(0, TOKENS, 1024):
        k, v = (chunk_of(name, start, start + 1024, HEADS, dim).astype(np.float64) for name in "kv")
        weights = np.exp(rows @ k.swapaxes(1, 2) * dim**-0.5)
        if causal:
            weights *= np.arange(start, start + 1024) <= at[:, None]
        total += weights.sum(-1, keepdims=True)
        out += weights @ v
        by_key += weights @ k
        both += (weights * (rows @ v.swapaxes(1, 2))) @ k
    delta = (rows * out / total).sum(-1, keepdims=True)
    exact = dim**-0.5 * (both - delta * by_key) / total
    sums = [np.array(ring.all_reduce(x.sum(axis=2)), np.float64) for x in (found[2], q)]
    return max(np.abs(exact - np.array(found[0][0])[:, picked]).max(), np.abs(sums[0] - sums[1]).max() / TOKENS)


if __name__ == "__main__":
    worker()
