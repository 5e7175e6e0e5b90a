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

from families import ALL, BASE, WINDOWS, build, build_other, words
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from plain_lm import ULPS, Tolerance, logits

from ringattn import lm
from ringattn.lm.sharding.forward_pass import flat

STEPS = (100, 1, 1, 3, 90, 5, 1, 1)  # tokens of each call: chunks for all ranks, and few tokens on every rank

MIXTURE = {"moe_intermediate_size": 48, "num_experts_per_tok": 2, "num_experts": 6, "norm_topk_prob": True}
ROUTED = {**MIXTURE, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "n_routed_experts": 6}
ROUTED |= {"routed_scaling_factor": 1.0, "first_k_dense_replace": 1}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {  # families of mlx-lm with `shard` that are not in families.ALL
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
SIZES = {  # that one rank of a row has a part of
    "hidden_size": 48,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "ffn_hidden_size": 48,
    "expert_ffn_hidden_size": 48,
    "share_expert_dim": 48,
    "shared_expert_intermediate_size": 48,
    "shared_intermediate_size": 0,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_attention_groups": 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "num_heads": 4,
}


def families() -> dict[str, tuple[str, dict[str, Any]]]:
    """The families that mlx-lm can divide, with heads for 2, 3, 4 and 6 ranks."""
    from importlib import import_module

    known = {**ALL, **OTHERS}
    return {
        name: (module, changes)
        for name, (module, changes) in known.items()
        if hasattr(import_module(f"mlx_lm.models.{module}").Model, "shard")
    }


def make(name: str, tensor: int, seed: int = 0) -> nn.Module:
    """Build a small model whose heads `tensor` ranks can share."""
    module, changes = families()[name]
    sizes = {**SIZES, **({"num_key_value_heads": 4} if "kv_lora_rank" in str(changes) else {})}
    scaled = {key: size * tensor for key, size in sizes.items()}
    nested = {key: {**one, **_known(scaled, one)} for key, one in changes.items() if isinstance(one, dict)}
    return build_other(module, {**changes, **scaled, **nested}, seed)


def _known(sizes: dict[str, int], config: dict[str, Any]) -> dict[str, Any]:
    """The sizes that a part of a configuration has, also in its own parts."""
    parts = {key: {**one, **_known(sizes, one)} for key, one in config.items() if isinstance(one, dict)}
    return {key: size for key, size in sizes.items() if key in config} | parts


@pytest.mark.parametrize("name", families())
def test_logits(grid: ra.Grid, rng: np.random.Generator, name: str) -> None:
    model = make(name, grid.tensor)
    ids = mx.array(rng.integers(0, BASE["vocab_size"], (1, sum(STEPS))))
    expected = logits(model, ids, STEPS)
    others = ((22,) * (ids.shape[1] // 22) + (ids.shape[1] % 22,), (1,) * 100 + (ids.shape[1] - 100,))
    allowed = Tolerance(lambda: make(name, grid.tensor), ids, expected, *others)
    lm.shard(model, grid)
    cache = make_prompt_cache(model)
    start = 0
    for tokens in STEPS:
        found = model(ids[:, start : start + tokens], cache=cache)
        whole = expected[:, start : start + tokens]
        if flat(cache)[0].step.shared:
            whole = flat(cache)[0].step.new.shard(whole, grid.column.rank, axis=1)
        mx.eval(found)
        allowed.check(found, whole, tokens)
        start += tokens


def nbytes(model: nn.Module) -> dict[str, int]:
    leaves: Any = tree_flatten(model.parameters())
    return {name: x.nbytes for name, x in leaves}


@pytest.mark.parametrize("name", families())
def test_a_rank_has_its_part_of_the_weights(grid: ra.Grid, name: str) -> None:
    """Each weight is divided by the ranks of a row, or replicated as mlx-lm does it."""
    model = make(name, grid.tensor)
    whole = nbytes(model)
    lm.shard(model, grid)
    own = nbytes(model)
    assert own.keys() == whole.keys()
    assert all(own[key] in (size, size // grid.tensor) for key, size in whole.items())
    divided = sum(size for key, size in whole.items() if own[key] < size)
    embeddings = sum(size for key, size in whole.items() if "embed_tokens" in key or "embedder" in key)
    assert grid.tensor == 1 or divided > 0.6 * (sum(whole.values()) - embeddings)


def test_quantised_weights(grid: ra.Grid, rng: np.random.Generator) -> None:
    model = build_other("llama", sizes_for(grid.tensor, hidden_size=64 * grid.tensor))
    nn.quantize(model, group_size=32, bits=4)
    ids = mx.array(rng.integers(0, BASE["vocab_size"], (1, 60)))
    expected = model(ids)
    mx.eval(expected)
    lm.shard(model, grid)
    cache = make_prompt_cache(model)
    found = model(ids, cache=cache)
    own = flat(cache)[0].step.new.shard(expected, grid.column.rank, axis=1)
    assert mx.abs(found - own).max() < ULPS * 2**-23 * mx.abs(expected).max()


def sizes_for(tensor: int, **more: Any) -> dict[str, Any]:
    """A configuration of a Llama that `tensor` ranks can share."""
    return {
        "num_attention_heads": 4 * tensor,
        "num_key_value_heads": 2 * tensor,
        "intermediate_size": 64 * tensor,
        **more,
    }


def test_tokens(grid: ra.Grid, rng: np.random.Generator) -> None:
    """mlx-lm's own loop over a grid gives the tokens of one process, for prompts of any length."""
    from mlx_lm.generate import generate_step

    model = make("qwen3", grid.tensor, seed=1)
    prompts = [rng.integers(0, BASE["vocab_size"], n).tolist() for n in (1, 2, 37, 131)]
    expected = [[token for token, _ in generate_step(mx.array(p), model, max_tokens=9)] for p in prompts]
    lm.shard(model, grid)
    for prompt, tokens in zip(prompts, expected):
        own = prompt if grid.ring.rank == 0 else [1]  # only rank 0's counts
        found = lm.stream_generate(model, words(), own, max_tokens=9, prefill_step_size=16)
        assert [response.token for response in found] == tokens


def test_one_rank_samples_for_all(grid: ra.Grid) -> None:
    """Ranks with different random numbers get the same tokens, also with a processor of logits on rank 0."""
    model = lm.shard(make("llama", grid.tensor), grid)
    mx.random.seed(grid.ring.rank)

    def banned(tokens: mx.array, logits: mx.array) -> mx.array:
        return mx.where(mx.arange(logits.shape[-1]) == 3, -mx.inf, logits)

    found = lm.stream_generate(
        model,
        words(),
        [5, 6, 7] * 9,
        max_tokens=12,
        sampler=lambda logprobs: mx.random.categorical(logprobs * 0.1),
        logits_processors=[banned],
    )
    tokens = mx.array([response.token for response in found])
    same = grid.ring.all_reduce(tokens * (grid.ring.rank == 0))
    assert tokens.size and mx.array_equal(tokens, same) and 3 not in tokens.tolist()


def test_error_of_one_rank(grid: ra.Grid) -> None:
    """An error of the sampler is raised on all ranks of the grid, and the model still works."""
    model = lm.shard(make("llama", grid.tensor), grid)

    def fail(logprobs: mx.array) -> mx.array:
        raise ValueError("no sample")

    with pytest.raises(ValueError, match="no sample"):
        list(lm.stream_generate(model, words(), [5, 6, 7], sampler=fail))
    assert len(list(lm.stream_generate(model, words(), [5, 6, 7], max_tokens=2))) == 2


def test_saved_cache(grid: ra.Grid, tmp_path_factory: pytest.TempPathFactory, rng: np.random.Generator) -> None:
    """A cache of a grid is saved and loaded, each rank's heads and tokens by itself."""
    from ringattn.transport.collectives import broadcast_bytes

    model = lm.shard(make("llama", grid.tensor), grid)
    ids = mx.array(rng.integers(0, BASE["vocab_size"], (1, 50)))
    cache = make_prompt_cache(model)
    mx.eval(model(ids, cache=cache))
    expected = model(ids[:, :1], cache=cache)
    mx.eval(expected)
    for layer in cache:
        layer.trim(1)
    own = None if grid.ring.rank else str(tmp_path_factory.mktemp("grid")).encode()
    path = f"{broadcast_bytes(grid.ring, own).decode()}/one.json"
    lm.save_cache(path, cache, {"who": f"rank {grid.ring.rank}"}, model=model)
    loaded, metadata = lm.load_cache(path, model)
    assert metadata == {"who": "rank 0"}
    assert mx.array_equal(model(ids[:, :1], cache=loaded), expected)
    grid.ring.barrier()


def test_wrong_models(grid: ra.Grid) -> None:
    """What cannot be divided is refused in one line on every rank, and nothing waits."""
    if grid.tensor == 1:
        return
    with pytest.raises(lm.UnsupportedModelError, match="mlx-lm cannot divide the weights of phi"):
        lm.shard(build("phi"), grid)
    odd = {"num_attention_heads": grid.tensor + 1, "num_key_value_heads": grid.tensor + 1}
    with pytest.raises(
        lm.UnsupportedModelError, match=f"tensor: {grid.tensor}, expected a divisor of {grid.tensor + 1}"
    ):
        lm.shard(build("llama", **odd, hidden_size=48 * (grid.tensor + 1)), grid)
    few = {"num_attention_heads": 4 * grid.tensor, "num_key_value_heads": 1}
    with pytest.raises(
        lm.UnsupportedModelError, match=f"tensor: {grid.tensor}, expected a divisor of 1, the n_kv_heads"
    ):
        lm.shard(build_other("llama", sizes_for(grid.tensor, **few, head_dim=16 * grid.tensor)), grid)


def test_wrong_rings(grid: ra.Grid) -> None:
    """A model that mlx-lm has divided is accepted on its column, and refused on a ring that crosses rows."""
    if grid.row is None:
        return
    model = make("llama", grid.tensor)
    model.shard(grid.row)
    if grid.rows > 1:
        crossing = grid.ring.split((grid.ring.rank % grid.tensor + grid.ring.rank // grid.tensor) % grid.tensor)
        with pytest.raises(ra.ArgumentError, match="shard: part of the weights differs between ranks"):
            lm.shard(model, crossing)
        crossing.close()
    lm.shard(model, grid.column)
    mx.eval(model(mx.zeros((1, 9), mx.int32), cache=make_prompt_cache(model)))
    with pytest.raises(ra.ArgumentError, match="one rank must sample for all: give ringattn.lm.shard a grid"):
        next(iter(lm.stream_generate(model, words(), [1, 2])))
    lm.shard(model, ra.grid(grid.ring, group=grid.row))
    assert len(list(lm.stream_generate(model, words(), [1, 2], max_tokens=3))) == 3


def test_pipelines_are_refused(grid: ra.Grid) -> None:
    if grid.row is None:
        return
    model = make("ministral3", grid.tensor)
    model.model.pipeline(grid.row)
    with pytest.raises(lm.UnsupportedModelError, match="into . stages by pipeline"):
        lm.shard(model, grid.column)
