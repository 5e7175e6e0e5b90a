"""A small random model of every family in the installed mlx-lm, from the fields of its configuration."""

from __future__ import annotations

import dataclasses
import pkgutil
import sys
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

VOCABULARY = 61
WINDOW = 21
TYPES = ["sliding_attention", "full_attention"] * 2
SCALED = {"type": "default", "rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1}
ROPE = {**SCALED, "original_max_position_embeddings": 64, "partial_rotary_factor": 1.0}

# Values of fields that count something, whatever their default: real models are too large for a test. Where layers can
# have windows, some have.
SIZES: dict[str, Any] = {
    "vocab_size hidden_size_vocab num_vocab": VOCABULARY,
    "hidden_size d_model n_embd dim model_dim hidden_dim": 64,
    "num_hidden_layers n_layer n_layers num_layers num_transformer_layers": 4,
    "num_attention_heads n_head n_heads num_heads": 4,
    "num_key_value_heads n_kv_heads num_kv_heads num_attention_groups": 2,
    "head_dim global_head_dim kv_channels hidden_size_per_head": 16,
    "intermediate_size ffn_hidden_size n_inner block_dim block_ff_dim ff_intermediate_size intermediate_size_mlp": 64,
    "moe_intermediate_size expert_ffn_hidden_size shared_intermediate_size shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size share_expert_dim moe_latent_size": 32,
    "n_routed_experts num_experts num_local_experts moe_num_experts": 4,
    "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts": 2,
    "n_shared_experts num_shared_experts num_shared_expert moe_num_shared_experts": 1,
    "n_group topk_group num_expert_group": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "index_head_dim": 8,
    "index_n_heads": 4,
    "index_topk": 16,
    "sliding_window sliding_window_size window_size attention_window_size loop_window_size": WINDOW,
    "sliding_window_pattern": 2,
    "layer_types": TYPES,
    "max_position_embeddings n_positions n_ctx model_max_length block_size": 4096,
    "conv_L_cache conv_kernel conv1d_width mamba_d_conv linear_conv_kernel_dim short_conv_kernel_size": 4,
    "state_size ssm_state_size mamba_d_state": 16,
    "mamba_num_heads mamba_n_heads linear_num_key_heads linear_num_value_heads": 4,
    "mamba_head_dim mamba_d_head linear_key_head_dim linear_value_head_dim": 16,
    "a_low_rank_dim v_low_rank_dim gate_low_rank_dim decay_low_rank_dim": 8,
    "hidden_size_per_layer_input vocab_size_per_layer_input": 0,
}
# Values of fields that have no default.
NEEDED: dict[str, Any] = {
    "rope_scaling": None,
    "rope_parameters": ROPE,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "hidden_act": "relu2",
    "mlp_only_layers sliding_window_layers": [],
    "time_step_limit": (0.0, 1.0),
    "time_step_rank": 4,
    "partial_rotary_factor rotary_pct": 1.0,
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "mla_scale_q_lora mla_scale_kv_lora": True,
    "rope_theta rotary_emb_base swa_rope_theta rope_local_base_freq": 1e4,
    "rms_norm_eps norm_eps layer_norm_eps layer_norm_epsilon layernorm_epsilon post_norm_eps": 1e-5,
}
GUESSES: dict[Any, Any] = {int: 1, float: 1.0, bool: False, str: "", dict: {}, list: []}


# Fields whose values depend on each other in one family.
SWA = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "swa_v_head_dim": 12}
DELTA = {"kda_layers": [1, 3], "full_attn_layers": [2, 4], "num_heads": 4, "head_dim": 16, "short_conv_kernel_size": 4}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "baichuan_m1": {"conv_window": 2, "sliding_window_layers": [1, 3]},
    "bailing_hybrid": {"layer_group_size": 2},
    "bailing_moe_linear": {"layer_group_size": 2, "group_norm_size": 1},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    },
    "deepseek_v2": {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"is_moe_layer": [False, True] * 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n": {
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5, 0.0] * 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "altup_num_inputs": 2,
        "altup_active_idx": 0,
        "laurel_rank": 8,
    },
    "gemma4": {"num_kv_shared_layers": 2},
    "gemma4_text": {"num_kv_shared_layers": 2},
    "gear": {"layer_types": ["conv_mixer", "full_attention"] * 2},
    "gptj": {"rotary_dim": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_n_groups": 1, "mamba_expand": 1},
    "hunyuan": {
        "cla_share_factor": 2,
        "use_cla": True,
        "rope_scaling": {"alpha": 2.0, "factor": 1.0, "type": "dynamic"},
    },
    "jamba": {"attn_layer_period": 2, "expert_layer_period": 2},
    "kimi_k3": {"linear_attn_config": DELTA},
    "kimi_linear": {"linear_attn_config": DELTA},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2-vl": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4": {"num_experts_per_tok": 1, "attention_chunk_size": 32},
    "llama4_text": {"no_rope_layers": [1, 0] * 2},
    "mellum": {"rope_parameters": dict.fromkeys(TYPES, SCALED)},
    "mimo_v2_flash": {"hybrid_layer_pattern": [1, 0] * 2, "moe_layer_freq": [0, 1] * 2, **SWA},
    "minicpm3": {"rope_scaling": {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4}},
    "minimax": {"rotary_dim": 16},
    "ministral3": {"rope_parameters": ROPE},
    "minimax_m3_vl": {
        "layer_types": None,
        "index_block_size": 8,
        "index_topk_blocks": 2,
        "sparse_attention_freq": [0, 1] * 2,
    },
    "mistral4": {"rope_parameters": ROPE},
    "muse_spark": {
        "num_shared_experts": 0,
        "moe_hidden_size": 32,
        "layer_rope_theta": [1e4, 0.0] * 2,
        "final_logit_softcapping": 20.0,
    },
    "nemotron-nas": {"block_configs": [{"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}}] * 4},
    "nemotron_h": {"layer_types": None, "hybrid_override_pattern": ["M", "*", "-", "*"], "time_step_limit": None},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "openelm": {"num_query_heads": [4] * 4, "num_kv_heads": [2] * 4, "ffn_multipliers": [1.0] * 4},
    "phi3small": {"vocab_size": 100_352},  # it names tokens up to there
    "phixtral": {"rotary_dim": 16},
    "plamo": {"n_shared_head": 2},
    "qwen3": {"rope_theta": 1e4},
    "qwen3_next": {"decoder_sparse_step": 2, "mlp_only_layers": []},
    "qwen3_vl": {"rope_theta": 1e4},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "spark2_5": {"rope_parameters": dict.fromkeys(TYPES, SCALED)},
}


def _by_name(table: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for names, value in table.items() for name in names.split()}


def families() -> list[str]:
    """The modules of mlx-lm that may define a language model, also those that cannot be imported."""
    found = []
    for module in pkgutil.iter_modules(import_module("mlx_lm.models").__path__):
        try:
            is_family = hasattr(_module(module.name), "Model")
        except (Exception, SystemExit):
            is_family = True
        if is_family:
            found.append(module.name)
    return sorted(found)


def _module(name: str) -> ModuleType:
    return import_module(f"mlx_lm.models.{name}")


def configuration(kind: type) -> dict[str, Any]:
    """A small configuration for the dataclass `kind` of a model's arguments."""
    sizes = _by_name(SIZES)
    return {**needed(kind), **{f.name: sizes[f.name] for f in dataclasses.fields(kind) if f.name in sizes}}


def needed(kind: type) -> dict[str, Any]:
    """Values of the fields of `kind` that have no default."""
    missing = dataclasses.MISSING
    fields = [f for f in dataclasses.fields(kind) if f.default is missing and f.default_factory is missing]
    table = {**_by_name(NEEDED), **_by_name(SIZES)}
    return {f.name: table.get(f.name, GUESSES.get(f.type)) for f in fields}


def _has_text_config(kind: type) -> bool:
    return any(field.name == "text_config" for field in dataclasses.fields(kind))


def _text_kind(module: ModuleType) -> tuple[str, type]:
    """The family and the configuration of the language model inside a model that has other parts too."""
    for name in ("TextArgs", "TextConfig", "TextModelArgs"):
        if hasattr(module, name):
            return module.__name__.rpartition(".")[2], getattr(module, name)
    bases = [sys.modules[base.__module__] for base in module.Model.__mro__[1:] if base.__name__ == "Model"]
    parts = [one for one in vars(module).values() if isinstance(one, ModuleType)]
    inner = next(one for one in bases + parts if hasattr(one, "ModelArgs"))
    return (
        _text_kind(inner) if _has_text_config(inner.ModelArgs) else (inner.__name__.rpartition(".")[2], inner.ModelArgs)
    )


def build(name: str, seed: int = 0) -> nn.Module:
    """Build a model of a family in float32, the same for the same seed."""
    module = _module(name)
    given = EXCEPTIONS.get(name, {})
    config = {**configuration(module.ModelArgs), "model_type": name}
    if _has_text_config(module.ModelArgs):
        text_module, kind = _text_kind(module)
        config["text_config"] = {**configuration(kind), "model_type": text_module, **given}
    else:
        config.update(given)
    return random_model(module.Model, module.ModelArgs, config, seed)


def random_model(model_kind: type, args_kind: Any, config: dict[str, Any], seed: int) -> nn.Module:
    """Build a model in float32 with random weights, also where mlx-lm begins with zeros or ones."""
    mx.random.seed(seed)
    model: nn.Module = model_kind(args_kind.from_dict(config))
    weights = [(key, x + 0.1 * mx.random.normal(x.shape)) for key, x in tree_flatten(model.parameters())]
    model.update(tree_unflatten(weights))
    mx.eval(model.parameters())
    return model
