"""Prefill of a hybrid with the shapes of a small real one: 2 ranks with a core each against 1 rank with a core.

Random weights in the shapes of a 0.5B model: 24 layers, three gated delta nets for each attention layer, hidden 1,024.
The logits are compared with those of plain mlx-lm first, on fewer tokens: its loop over tokens is slow on a CPU.
"""

from __future__ import annotations

import time
from statistics import median

import ringattn as ra  # before MLX, for its BLAS
from ringattn import lm
from ringattn.lm.sharding.sharded_cache import held_bytes

import mlx.core as mx  # isort: skip
from mlx.utils import tree_map  # isort: skip

from .common import run_ranks, show, write_result

TOKENS = 4096  # of the prompt, read in one round
CHECKED = 128  # tokens that are compared
RUNS = 2
TEXT = {
    "model_type": "qwen3_5",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "intermediate_size": 3584,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_value_heads": 16,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "partial_rotary_factor": 0.25,
    "rope_theta": 1e7,
    "rms_norm_eps": 1e-6,
    "vocab_size": 4096,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}


def main() -> None:
    """Compare, then time both in turn."""
    runs: dict[int, list] = {1: [], 2: []}
    for _ in range(RUNS):
        for ranks, found in runs.items():
            found.append(run_ranks("benchmarks.hybrid", ranks, 1))
    seconds = {ranks: median(max(rank["seconds"] for rank in run) for run in found) for ranks, found in runs.items()}
    rows = [
        [
            ranks,
            f"{seconds[ranks]:.1f}",
            f"{seconds[1] / seconds[ranks]:.2f}",
            f"{max(rank['error'] for run in found for rank in run) * 2**23:.0f}",
            f"{sum(rank['bytes'] for rank in found[0]) / 1e6:.1f}",
            f"{max(rank['held'] for rank in found[0]) / 1e6:.1f}",
        ]
        for ranks, found in runs.items()
    ]
    head = [
        "ranks",
        "seconds",
        "speed-up",
        "error, ulps of the largest logit",
        "sent by all, MB",
        "context on a rank, MB",
    ]
    show(f"Prefill of {TOKENS} tokens by a hybrid of 24 layers, one core a rank (aim: 1.80)", head, rows)


def worker() -> None:
    """Measure on one rank."""
    from mlx_lm.models.qwen3_5 import Model, ModelArgs

    mx.set_default_device(mx.cpu)
    with ra.init() as ring:
        mx.random.seed(0)
        model = Model(ModelArgs.from_dict({"model_type": "qwen3_5", "text_config": TEXT}))
        mx.eval(model.parameters())
        ids = mx.random.randint(0, TEXT["vocab_size"], (1, TOKENS))
        expected = model(ids[:, :CHECKED])
        mx.eval(expected)
        lm.shard(model, ring)
        cache = model.make_cache()
        found = model(ids[:, :CHECKED], cache=cache)
        step = cache[0].step
        error = mx.abs(found - step.new.shard(expected, ring.rank, axis=1)).max() / mx.abs(expected).max()
        result = {"error": error.item()}
        cache = model.make_cache()
        before = ring.bytes_sent
        ring.barrier()
        start = time.perf_counter()
        model(ids, cache=cache)
        mx.eval(tree_map(lambda c: c.state, cache))
        ring.barrier()
        result["seconds"] = time.perf_counter() - start
        result["bytes"] = ring.bytes_sent - before
        result["held"] = held_bytes(cache)
        write_result(ring.rank, result)


if __name__ == "__main__":
    worker()
