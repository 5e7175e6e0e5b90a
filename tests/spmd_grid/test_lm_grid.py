"""Language models whose weights are shared by the ranks of a row give the results of one process."""

from __future__ import annotations

import os
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import ringattn as ra

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

from families import BASE, FAMILIES, WINDOWS, build_other, words
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from ringattn import lm
from ringattn.lm.sharding.weights import group_of

STEPS = (100, 1, 1, 3, 90, 5, 1, 1)  # tokens of each call: chunks for all ranks, and few tokens on every rank
ULPS = 32  # of the largest logit, float32; those of tests/spmd/test_lm.py

MIXTURE = {"moe_intermediate_size": 48, "num_experts_per_tok": 2, "num_experts": 6, "norm_topk_prob": True}
ROUTED = {**MIXTURE, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "n_routed_experts": 6}
ROUTED |= {"routed_scaling_factor": 1.0, "first_k_dense_replace": 1}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {  # families of mlx-lm with `shard` that are not among FAMILIES
    "qwen3_moe": ("qwen3_moe", {**MIXTURE, "decoder_sparse_step": 1, "mlp_only_layers": [1], "rope_theta": 1e4}),
    "glm4_moe": (
        "glm4_moe",
        {**ROUTED, "rope_theta": 1e4, "use_qk_norm": True, "attention_bias": False}
        | {"partial_rotary_factor": 0.5, "rope_scaling": None},
    ),
    "minimax": (
        "minimax",
        {**MIXTURE, "num_local_experts": 6, "shared_intermediate_size": 0, "rotary_dim": 8, "rope_theta": 1e4}
        | {"scoring_func": "sigmoid", "use_qk_norm": True},
    ),
    "exaone_moe": (
        "exaone_moe",
        {**MIXTURE, "num_shared_experts": 1, "layer_types": WINDOWS, "sliding_window": 21}
        | {"is_moe_layer": [False, True, True, True]},
    ),
    "step3p5": (
        "step3p5",
        {"layer_types": WINDOWS, "sliding_window": 21, "num_attention_groups": 2, "moe_num_experts": 6}
        | {"moe_top_k": 2, "moe_intermediate_size": 48, "share_expert_dim": 48, "moe_layers_enum": "1,2,3"},
    ),
}


def families() -> dict[str, tuple[str, dict[str, Any]]]:
    """The families that mlx-lm can divide, with heads for 2, 3, 4 and 6 ranks."""
    from importlib import import_module

    known = {**FAMILIES, **OTHERS}
    return {
        name: (module, changes)
        for name, (module, changes) in known.items()
        if hasattr(import_module(f"mlx_lm.models.{module}").Model, "shard")
    }


def make(name: str, tensor: int, seed: int = 0) -> nn.Module:
    """Build a small model whose heads `tensor` ranks can share."""
    module, changes = families()[name]
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "moe_intermediate_size": 48}
    sizes |= {"num_attention_groups": 2, "share_expert_dim": 48, "shared_intermediate_size": 0}
    if "kv_lora_rank" in changes:
        sizes["num_key_value_heads"] = 4
    return build_other(module, {**changes, **{key: size * tensor for key, size in sizes.items()}}, seed)


@pytest.mark.parametrize("name", families())
def test_logits(grid: ra.Grid, rng: np.random.Generator, name: str) -> None:
    model = make(name, grid.tensor)
    plain = make_prompt_cache(model)
    calls = [mx.array(rng.integers(0, BASE["vocab_size"], (1, tokens))) for tokens in STEPS]
    expected = [model(ids, cache=plain) for ids in calls]
    mx.eval(expected)
    lm.shard(model, grid)
    cache = make_prompt_cache(model)
    for ids, whole in zip(calls, expected):
        found = model(ids, cache=cache)
        if cache[0].step.shared:
            whole = cache[0].step.new.shard(whole, grid.column.rank, axis=1)
        assert found.shape == whole.shape
        mx.eval(found)
        if not found.size:
            continue
        error = float(mx.abs(found - whole).max() / mx.abs(whole).max())
        assert error < ULPS * 2**-23, (ids.shape, error * 2**23)
