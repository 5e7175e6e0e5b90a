"""Time a ring of GPUs against one of them: causal attention, zigzag, bfloat16, head_dim 128; answers checked first.

Run ``ringattn launch -n 4 python -m tools.nvidia.scaling results.json``. `tools.nvidia.scaling_torch` times PyTorch's
``context_parallel`` on the same GPUs, and `tools.nvidia.scaling_plot` draws both.

A time is the median of several samples. A sample is several calls one after the other, on all ranks, and counts as long
as on the slowest rank. Rank 0 computes the whole problem by itself for the time of one GPU.
"""

from __future__ import annotations

import os

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # before MLX is imported: float32 products in float32

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import click
import mlx.core as mx
import numpy as np

import ringattn as ra
from ringattn.transport import Ring
from ringattn.verify.oracle import Case, ratios

DIM = 128
ROWS = 8  # of a rank that are compared with float64
SAMPLES, CALLS = 5, 3
LONG = 200_000  # tokens: such a problem is timed once


@dataclass(frozen=True)
class Problem:
    """Causal attention over `tokens` tokens, with `heads` query and key/value heads."""

    heads: tuple[int, int]
    tokens: int

    def head(self, name: str, index: int, spans: tuple[tuple[int, int], ...]) -> mx.array:
        """The tokens at `spans` of one head of q, k, v or dout: the same numbers on every rank."""
        key = mx.random.key(1000 * "qkvd".index(name) + index)
        whole = mx.random.normal((self.tokens, DIM), key=key).astype(mx.bfloat16)
        return mx.concatenate([whole[start:stop] for start, stop in spans])

    def arrays(self, spans: tuple[tuple[int, int], ...], names: str = "qkv") -> list[mx.array]:
        """q, k and v at `spans`."""
        made = []
        for name in names:
            x = []
            for index in range(self.heads[name in "kv"]):
                x.append(self.head(name, index, spans))
                mx.eval(x[-1])
            made.append(mx.stack(x).reshape(1, len(x), -1, DIM))
            mx.eval(made[-1])
        return made

    def error(self, layout: ra.Layout, rank: int, out: mx.array, lse: mx.array) -> float:
        """The largest error of some rows of a rank, in the first and the last head, as a fraction of the allowed."""
        rows = np.unique(np.linspace(0, out.shape[2] - 1, ROWS).astype(int))
        positions = layout.positions(rank)[rows]
        group = self.heads[0] // self.heads[1]
        worst = 0.0
        for kv_head in sorted({0, self.heads[1] - 1}):
            head = kv_head * group
            whole = ((0, int(positions[-1]) + 1),)
            k, v = (self.head(name, kv_head, whole)[None, None] for name in "kv")
            q = self.head("q", head, tuple((int(p), int(p) + 1) for p in positions))[None, None]
            case = Case(q, k, v, positions, np.arange(k.shape[2]), {"mask": "causal"})
            at = mx.array(rows)
            worst = max(worst, *ratios(case, out[:, head : head + 1, at], lse[:, head : head + 1, at]))
        return worst


def seconds(ring: Ring, call: Callable[[], object], samples: int = SAMPLES, calls: int = CALLS) -> float:
    """The median seconds of `call`, which all ranks make, on the slowest rank."""
    call()
    times = []
    for _ in range(samples):
        ring.barrier()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls)
    return median(slowest(ring, times))


def slowest(ring: Ring, numbers: list[float]) -> list[float]:
    """The largest of each number over all ranks."""
    own = np.zeros((ring.size, len(numbers)), np.float32)
    own[ring.rank] = numbers
    return np.array(ring.all_reduce(mx.array(own))).max(0).tolist()


def alone(ring: Ring, call: Callable[[], object], samples: int = SAMPLES, calls: int = CALLS) -> float:
    """The median seconds of `call` on rank 0, while the others wait."""
    times = []
    if ring.rank == 0:
        call()
        for _ in range(samples):
            start = time.perf_counter()
            for _ in range(calls):
                call()
            times.append((time.perf_counter() - start) / calls)
    ring.barrier()
    return slowest(ring, [median(times) if times else 0.0])[0]


def measure(ring: Ring, problem: Problem, gradient: bool, against_one: bool) -> dict:
    """Check, time, and describe one problem."""
    layout = ra.Layout.zigzag(problem.tokens, ring.size)
    spans = layout.spans[ring.rank]
    arrays = problem.arrays(spans)
    ours = ring_call(ring, layout, arrays, problem.arrays(spans, "d") if gradient else [])
    out, lse = ra.ring_attention(*arrays, ring=ring, layout=layout, mask="causal", return_lse=True)
    error = slowest(ring, [problem.error(layout, ring.rank, out, lse)])[0]
    del out, lse, arrays
    mx.reset_peak_memory()
    took = seconds(ring, ours, *((1, 1) if problem.tokens > LONG else ()))
    memory = slowest(ring, [mx.get_peak_memory() / 2**30])[0]
    del ours
    record = {
        "what": "ringattn",
        "heads": problem.heads,
        "tokens": problem.tokens,
        "ranks": ring.size,
        "gradient": gradient,
        "error": error,
        "seconds": took,
        "GiB a rank": memory,
        "links": type(getattr(ring, "_links", None)).__name__,
    }
    if against_one:
        record["alone"] = whole(ring, problem, gradient)
        record["of ideal"] = record["alone"] / (ring.size * took)
    return record


def ring_call(ring: Ring, layout: ra.Layout, arrays: list[mx.array], cotangent: list[mx.array]) -> Callable[[], object]:
    """The call to time, with the gradient where there is a `cotangent`."""

    def attend(*own: mx.array, **more: bool) -> mx.array | tuple[mx.array, mx.array]:
        return ra.ring_attention(*own, ring=ring, layout=layout, mask="causal", **more)

    if not cotangent:
        return lambda: attend(*arrays, return_lse=True)
    return lambda: there_and_back(attend, arrays, cotangent)


def whole(ring: Ring, problem: Problem, gradient: bool) -> float:
    """The seconds of one GPU for the whole problem."""
    if ring.rank != 0:
        return alone(ring, lambda: None)
    everything = ((0, problem.tokens),)
    arrays = problem.arrays(everything)
    if not gradient:
        return alone(ring, lambda: mx.eval(ra.attention(*arrays, mask="causal", return_lse=True)))
    cotangent = problem.arrays(everything, "d")
    return alone(ring, lambda: there_and_back(lambda *a: ra.attention(*a, mask="causal"), arrays, cotangent))


def there_and_back(function: Callable, arrays: list[mx.array], cotangent: list[mx.array]) -> None:
    """Compute `function` and its gradient."""
    mx.eval(mx.vjp(lambda *a: [function(*a)], arrays, cotangent))


@click.command()
@click.argument("file", type=Path)
@click.option("--tokens", default="32768,65536,131072", show_default=True, help="Lengths, separated by commas.")
@click.option("--heads", default="16/16,16/4", show_default=True, help="Query and key/value heads.")
@click.option("--gradient", is_flag=True, help="Time the forward and the backward pass together.")
@click.option("--no-one", is_flag=True, help="Do not time one GPU.")
def main(file: Path, tokens: str, heads: str, gradient: bool, no_one: bool) -> None:
    records = []
    with ra.init() as ring:
        for names in heads.split(","):
            q_heads, kv_heads = map(int, names.split("/"))
            for n in map(int, tokens.split(",")):
                record = measure(ring, Problem((q_heads, kv_heads), n), gradient, not no_one)
                records.append(record)
                if ring.rank == 0:
                    click.echo(json.dumps(record))
                    file.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
