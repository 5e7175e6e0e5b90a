"""A Llama on two hosts of the virtual cluster, a core each: weights divided by mlx-lm, or context spread over a ring.

sudo python -m benchmarks tensor

Bytes are those of the hosts' network interfaces, with the headers of TCP.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import ringattn as ra  # before MLX, for its BLAS
from ringattn import lm

import mlx.core as mx  # isort: skip

from launch.virtual import Cluster, unavailable

from .common import run_ranks, show, small_llama, write_result

CONFIG = small_llama(12)
PREFILL = 1024  # tokens
STEPS = 12  # new tokens
RUNS = 3
RATES = ("1gbit", "10gbit")
MOST = 1e-4  # difference of logits, of the largest one


def main() -> None:
    """Measure both, at each rate, and print times and bytes."""
    if reason := unavailable():
        print(f"\ntensor: skipped: {reason}")
        return
    rows = []
    for rate in RATES:
        with Cluster(2, rate=rate, cores=1) as cluster:
            for how in ("tensor", "ring"):
                runs = [
                    run_ranks("benchmarks.tensor", 2, 1, how, hosts=cluster.addresses, base=cluster.environment)
                    for _ in range(RUNS)
                ]
                seconds = [median(max(rank[name] for rank in run) for run in runs) for name in ("prefill", "decode")]
                sent = median(sum(rank["bytes"] for rank in run) for run in runs) / PREFILL
                held = runs[0][0]["weights"] / 1e6
                times = [f"{PREFILL / seconds[0]:.0f}", f"{seconds[1] * 1e3:.1f}"]
                rows.append([rate, how, *times, f"{sent:.0f}", f"{formula(how):.0f}", f"{held:.1f}"])
    head = [
        "links",
        "divided",
        "prefill, tokens/s",
        "decode, ms/token",
        "bytes a prompt token",
        "formula",
        "weights, MB",
    ]
    show("A Llama of 576 x 12 layers, float32, 2 hosts with a core each", head, rows)


def formula(how: str) -> float:
    """Bytes that two ranks together send for each token of a prompt, float32.

    Divided weights: in each layer two sums of the hidden state, of which each rank sends as much as it holds. A ring:
    in each layer the keys and values of the first half of the prompt, from the first rank to the second.
    """
    layers, hidden = CONFIG["num_hidden_layers"], CONFIG["hidden_size"]
    if how == "tensor":
        return 4.0 * layers * 2 * 2 * hidden
    return 4.0 * layers * CONFIG["num_key_value_heads"] * 2 * CONFIG["head_dim"] / 2


def worker() -> None:
    """Measure on one rank."""
    from mlx.utils import tree_flatten
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.models.llama import Model, ModelArgs

    mx.set_default_device(mx.cpu)
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(CONFIG))
    mx.eval(model.parameters())
    ids = mx.random.randint(0, CONFIG["vocab_size"], (1, PREFILL))
    expected = model(ids)[:, -1]
    mx.eval(expected)
    with ra.init() as ring, ra.grid(ring, 2 if sys.argv[2] == "tensor" else 1) as grid:
        if grid.row is not None:
            model.shard(grid.row)  # mlx-lm's own, with its own caches
            mx.eval(model.parameters())
        else:
            lm.shard(model, ring)
        found, prefill, sent, cache = _prefill(ring, model, ids, lambda: make_prompt_cache(model))
        if grid.row is not None or ring.rank == ring.size - 1:  # the rank with the last token
            assert mx.abs(found[:, -1] - expected).max() < MOST * mx.abs(expected).max()
        decode = _decode(model, ids, cache)
        leaves = tree_flatten(model.parameters())
        weights = sum(x.nbytes for _, x in leaves)
        write_result(ring.rank, {"prefill": prefill, "decode": decode, "bytes": sent, "weights": weights})


def _prefill(ring: ra.Ring, model, ids: mx.array, make_cache: Callable[[], list]) -> tuple[mx.array, float, int, list]:
    """Logits, seconds, bytes sent and cache of the second prefill of the whole prompt."""
    for _ in range(2):
        cache = make_cache()
        ring.barrier()
        before = _sent()
        start = time.perf_counter()
        found = model(ids, cache=cache)
        mx.eval(found, [c.state for c in cache])
        ring.barrier()
        seconds = time.perf_counter() - start
    return found, seconds, _sent() - before, cache


def _decode(model, ids: mx.array, cache: list) -> float:
    """Median seconds of a step with one new token."""
    times = []
    for i in range(STEPS):
        start = time.perf_counter()
        mx.eval(model(ids[:, i : i + 1], cache=cache))
        times.append(time.perf_counter() - start)
    return median(times)


def _sent() -> int:
    """Bytes that this host has sent."""
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


if __name__ == "__main__":
    worker()
