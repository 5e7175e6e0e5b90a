"""Time a ring of GPUs against one of them: causal attention, zigzag, bfloat16, head_dim 128; answers checked first.

Run ``ringattn launch -n 4 python -m tools.nvidia.scaling results.json``. `tools.nvidia.scaling_torch` times PyTorch's
``context_parallel`` on the same GPUs, and `tools.nvidia.scaling_plot` draws both.

A time is the median of several samples. A sample is several calls one after the other, on all ranks, and counts as long
as on the slowest rank, until its GPU is done. Rank 0 computes the whole problem by itself for the time of one GPU.
"""

from __future__ import annotations

import os

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # before MLX is imported: float32 products in float32

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import mlx.core as mx
import numpy as np

import ringattn as ra
from ringattn.transport import Ring

from .scaling_problem import Problem, gradient_error

SAMPLES, CALLS = 5, 3
VERY_LONG = 200_000  # tokens: there is one sample of one call


def repeats(tokens: int) -> tuple[int, int]:
    """How many samples are taken of a problem, and how many calls make one."""
    return (1, 1) if tokens > VERY_LONG else (SAMPLES, CALLS)


def seconds(ring: Ring, call: Callable[[], object], samples: int, calls: int) -> float:
    """The median seconds of `call`, which all ranks make, on the slowest rank."""
    return median(slowest(ring, samples_of(call, samples, calls, ring.barrier)))


def samples_of(call: Callable[[], object], samples: int, calls: int, begin: Callable[[], None]) -> list[float]:
    """The seconds of a call in each sample, after one that is not timed."""
    call()
    times = []
    for _ in range(samples):
        mx.synchronize()
        begin()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        mx.synchronize()
        times.append((time.perf_counter() - start) / calls)
    return times


def slowest(ring: Ring, numbers: list[float]) -> list[float]:
    """The largest of each number over all ranks."""
    own = np.zeros((ring.size, len(numbers)), np.float32)
    own[ring.rank] = numbers
    return np.array(ring.all_reduce(mx.array(own))).max(0).tolist()


def alone(ring: Ring, call: Callable[[], object], samples: int, calls: int) -> float:
    """The median seconds of `call` on rank 0, while the others wait."""
    times = samples_of(call, samples, calls, lambda: None) if ring.rank == 0 else []
    ring.barrier()
    return slowest(ring, [median(times) if times else 0.0])[0]


def measure(ring: Ring, problem: Problem, gradient: bool, against_one: bool) -> dict:
    """Check, time, and describe one problem."""
    layout = ra.Layout.zigzag(problem.tokens, ring.size)
    spans = layout.spans[ring.rank]
    arrays = problem.arrays(spans)
    ours = ring_call(ring, layout, arrays, problem.arrays(spans, "d") if gradient else [])
    results = ra.ring_attention(*arrays, ring=ring, layout=layout, mask="causal", return_lse=True)
    errors = [problem.error(layout, ring.rank, *results)]
    if gradient:
        errors.append(gradient_error(problem, ring, layout, results, ours()))
    errors = slowest(ring, errors)
    del results, arrays
    mx.reset_peak_memory()
    took = seconds(ring, ours, *repeats(problem.tokens))
    memory = slowest(ring, [mx.get_peak_memory() / 2**30])[0]
    del ours
    record = {
        "what": "ringattn",
        "heads": problem.heads,
        "tokens": problem.tokens,
        "ranks": ring.size,
        "gradient": gradient,
        "error": errors[0],
        "seconds": took,
        "GiB a rank": memory,
        "links": type(getattr(ring, "_links", None)).__name__,
    }
    if gradient:
        record["gradient error"] = errors[1]
    if against_one:
        record["alone"] = whole(ring, problem, gradient)
        record["of ideal"] = record["alone"] / (ring.size * took)
    return record


def ring_call(ring: Ring, layout: ra.Layout, arrays: list[mx.array], cotangent: list[mx.array]) -> Callable[[], Any]:
    """The call to time, with the gradient where there is a `cotangent`."""

    def attend(*own: mx.array, **more: bool) -> mx.array | tuple[mx.array, mx.array]:
        return ra.ring_attention(*own, ring=ring, layout=layout, mask="causal", **more)

    if not cotangent:
        return lambda: attend(*arrays, return_lse=True)
    return lambda: there_and_back(attend, arrays, cotangent)


def whole(ring: Ring, problem: Problem, gradient: bool) -> float:
    """The seconds of one GPU for the whole problem."""
    count = repeats(problem.tokens)
    if ring.rank != 0:
        return alone(ring, lambda: None, *count)
    everything = ((0, problem.tokens),)
    arrays = problem.arrays(everything)
    if not gradient:
        return alone(ring, lambda: mx.async_eval(ra.attention(*arrays, mask="causal", return_lse=True)), *count)
    cotangent = problem.arrays(everything, "d")
    return alone(ring, lambda: there_and_back(lambda *a: ra.attention(*a, mask="causal"), arrays, cotangent), *count)


def there_and_back(function: Callable, arrays: list[mx.array], cotangent: list[mx.array]) -> list[mx.array]:
    """Compute `function` and its gradients, and return these."""
    results, gradients = mx.vjp(lambda *a: [function(*a)], arrays, cotangent)
    mx.async_eval(results, gradients)
    return gradients


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
