"""Small random models of mlx-lm's families, built by mlx-lm's own classes."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from every_family import needed, random_model
from mlx.utils import tree_flatten

BASE: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": 61,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
WINDOWS = ["sliding_attention", "full_attention"] * 2
TURNS = "{% for m in messages %}{{ m['content'] }} w57 {% endfor %}"
CHAT_TEMPLATE = TURNS + "{% if add_generation_prompt %}w58 {% endif %}"
DELTA = {  # of gated delta nets
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 3,
    "num_hidden_layers": 5,
    "partial_rotary_factor": 0.5,
    "rope_theta": 1e4,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "shared_expert_intermediate_size": 24,
    "mlp_only_layers": [],
    "moe_intermediate_size": 24,
}
MAMBA = {  # Mamba 2
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "mamba_n_heads": 6,
    "mamba_d_head": 8,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_n_groups": 2,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
}
MAMBA_1 = {
    "state_size": 8,
    "num_hidden_layers": 3,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": "auto",
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}
GROUPS = {  # of experts
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
}
INDEXED = {"index_topk": 16, "index_n_heads": 4, "index_head_dim": 8}
SCALED = {"rope_theta": 1e4, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # name: mlx-lm's module, differences from BASE
    "llama": ("llama", {}),
    "llama with scaled rope": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"rope_theta": 1e4}),
    "mistral, windows": ("llama", {"layer_types": WINDOWS, "sliding_window": 21}),
    "ministral3": (
        "ministral3",
        {
            "layer_types": WINDOWS,
            "sliding_window": 21,
            "rope_parameters": {
                "rope_theta": 1e4,
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 64,
                "type": "default",
            },
        },
    ),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"attn_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", {"sliding_window": 21, "sliding_window_pattern": 2}),
    "gemma4, shared keys": (
        "gemma4_text",
        {
            "layer_types": WINDOWS,
            "sliding_window": 21,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 0,
            "global_head_dim": 16,
        },
    ),
    "phi": ("phi", {"num_key_value_heads": 4, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5}),
    "phi3": ("phi3", {}),
    "stablelm": (
        "stablelm",
        {"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "use_qkv_bias": True, "rope_theta": 1e4},
    ),
    "plamo3": ("plamo3", {"window_size": 21, "sliding_window": 21, "sliding_window_pattern": 2}),
    "gpt_oss": (
        "gpt_oss",
        {"layer_types": WINDOWS, "sliding_window": 21, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 32,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
            "rope_scaling": {"factor": 2.0, "mscale_all_dim": 1.0, "mscale": 1.0, "type": "yarn"},
        },
    ),
    "deepseek_v3": ("deepseek_v3", LATENT),
    "deepseek_v3, queries without a latent": ("deepseek_v3", {**LATENT, "q_lora_rank": None}),
    "glm4_moe_lite": ("glm4_moe_lite", LATENT),
    "mistral4": ("mistral4", {**LATENT, "rope_parameters": {**SCALED, "type": "default"}}),
    "longcat_flash": (
        "longcat_flash",
        {**LATENT, "num_layers": 2, "rope_scaling": {"factor": 2.0, "mscale_all_dim": 1.0, "type": "yarn"}},
    ),
    "deepseek_v32": ("deepseek_v32", {**LATENT, **INDEXED}),
    "glm_moe_dsa": ("glm_moe_dsa", {**LATENT, **INDEXED, "rope_parameters": SCALED, "n_routed_experts": 4}),
    "llama4": (
        "llama4",
        {
            "text_config": {
                **BASE,
                "model_type": "llama4_text",
                "attention_bias": False,
                "attention_chunk_size": 32,
                "interleave_moe_layer_step": 2,
                "intermediate_size_mlp": 64,
                "num_experts_per_tok": 1,
                "num_local_experts": 4,
                "rope_scaling": None,
                "rope_theta": 1e4,
                "use_qk_norm": True,
                "floor_scale": 40,
            }
        },
    ),
    "afm7": (
        "afm7",
        {"hidden_dim": 48, "num_layers": 4, "num_kv_reuse_layers": 2, "num_heads": 4, "num_kv_heads": 2},
    ),
    "iquestloopcoder": ("iquestloopcoder", {"loop_window_size": 21, "loop_num": 2}),
}
RECURRENT: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("qwen3_next", {**DELTA, **EXPERTS}),
    "qwen3_5": ("qwen3_5", {"text_config": {**BASE, **DELTA, "model_type": "qwen3_5"}}),
    "qwen3_5_moe": ("qwen3_5_moe", {"text_config": {**BASE, **DELTA, **EXPERTS, "model_type": "qwen3_5_moe"}}),
    "lfm2": (
        "lfm2",
        {
            "norm_eps": 1e-5,
            "conv_bias": False,
            "conv_L_cache": 3,
            "block_dim": 48,
            "block_ff_dim": 64,
            "block_multiple_of": 8,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": False,
            "full_attn_idxs": [1, 3],
            "rope_theta": 1e4,
        },
    ),
    "lfm2_moe": (
        "lfm2_moe",
        {
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "use_expert_bias": True,
            "num_dense_layers": 1,
            "norm_eps": 1e-5,
            "conv_bias": False,
            "conv_L_cache": 3,
            "full_attn_idxs": [1, 3],
            "rope_theta": 1e4,
        },
    ),
    "mamba2": (
        "mamba2",
        {
            "num_heads": 6,
            "head_dim": 16,
            "state_size": 16,
            "num_hidden_layers": 3,
            "layer_norm_epsilon": 1e-5,
            "conv_kernel": 4,
            "n_groups": 2,
            "use_bias": False,
            "use_conv_bias": True,
            "tie_word_embeddings": False,
            "time_step_limit": (0.001, 100.0),
            "time_step_rank": "auto",
        },
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            **MAMBA,
            "attention_bias": False,
            "mamba_hidden_act": "silu",
            "conv_kernel": 4,
            "n_groups": 2,
            "ssm_state_size": 16,
            "time_step_limit": (0.001, 100.0),
            "mlp_bias": False,
            "mlp_hidden_act": "relu2",
            "layer_norm_epsilon": 1e-5,
            "use_bias": False,
            "use_conv_bias": True,
            "hybrid_override_pattern": ["M", "*", "-", "M", "*"],
            "num_hidden_layers": 5,
        },
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **MAMBA,
            "embedding_multiplier": 1.0,
            "attention_multiplier": 0.25,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "layer_types": ["mamba", "attention", "mamba", "attention"],
            "attention_bias": False,
            "rope_theta": 1e4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 24,
        },
    ),
    "falcon_h1": (
        "falcon_h1",
        {**MAMBA, "mamba_d_ssm": 48, "mamba_rms_norm": True, "num_hidden_layers": 2, "rope_theta": 1e4},
    ),
    "kimi_linear": (
        "kimi_linear",
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
            "linear_attn_config": {
                "kda_layers": [1, 2, 4],
                "full_attn_layers": [3],
                "num_heads": 4,
                "head_dim": 12,
                "short_conv_kernel_size": 4,
            },
            "num_experts": 0,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "rope_theta": 1e4,
            "model_max_length": 4096,
        },
    ),
    "olmo_hybrid": (
        "olmo_hybrid",
        {
            **DELTA,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "num_hidden_layers": 4,
            "linear_num_key_heads": 4,
            "linear_allow_neg_eigval": True,
            "attention_bias": False,
            "rope_parameters": {"rope_theta": 1e4},
        },
    ),
    "bailing_moe_linear": (
        "bailing_moe_linear",
        {
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_shared_experts": 1,
            "norm_topk_prob": True,
            "num_experts_per_tok": 2,
            "rope_theta": 1e4,
            "first_k_dense_replace": 1,
            "layer_group_size": 2,
            "group_norm_size": 2,
            "topk_group": 1,
        },
    ),
    "bailing_hybrid": (
        "bailing_hybrid",
        {
            **LATENT,
            **GROUPS,
            "q_lora_rank": 24,
            "num_shared_experts": 1,
            "group_norm_size": 2,
            "layer_group_size": 2,
            "rope_theta": 1e4,
        },
    ),
    "bailing_moe_v3": (
        "bailing_moe_v3",
        {
            **LATENT,
            **GROUPS,
            "q_lora_rank": 24,
            "head_dim": 12,
            "layer_group_size": 2,
            "moe_shared_expert_intermediate_size": 24,
        },
    ),
    "kimi_k3": (
        "kimi_k3",
        {
            "text_config": {
                **BASE,
                **LATENT,
                "num_key_value_heads": 4,
                "linear_attn_config": {
                    "kda_layers": [1, 2, 4],
                    "full_attn_layers": [3],
                    "num_heads": 4,
                    "head_dim": 12,
                    "short_conv_kernel_size": 4,
                },
                "attn_res_block_size": 2,
            }
        },
    ),
    "rwkv7": (
        "rwkv7",
        {
            "norm_eps": 1e-5,
            "a_low_rank_dim": 8,
            "v_low_rank_dim": 8,
            "gate_low_rank_dim": 8,
            "decay_low_rank_dim": 8,
        },
    ),
    "jamba": (
        "jamba",
        {
            **MAMBA,
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "expert_layer_offset": 1,
            "expert_layer_period": 2,
            "mamba_expand": 2,
            "num_experts": 1,
            "num_experts_per_tok": 2,
        },
    ),
    "mamba": ("mamba", MAMBA_1),
    "falcon_mamba": ("mamba", {**MAMBA_1, "model_type": "falcon_mamba"}),
    "recurrent_gemma": (
        "recurrent_gemma",
        {
            "attention_bias": False,
            "conv1d_width": 4,
            "logits_soft_cap": 30.0,
            "attention_window_size": 21,
            "rope_theta": 1e4,
            "block_types": ["recurrent", "recurrent", "attention"],
            "num_hidden_layers": 5,
        },
    ),
    "gear": (
        "gear",
        {
            "layer_types": ["conv_mixer", "sliding_attention", "conv_mixer", "full_attention"],
            "sliding_window": 21,
        },
    ),
    "longcat_flash_ngram": (
        "longcat_flash_ngram",
        {
            **LATENT,
            "q_lora_rank": 24,
            "ffn_hidden_size": 64,
            "moe_topk": 2,
            "expert_ffn_hidden_size": 24,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "num_layers": 2,
            "routed_scaling_factor": 2.5,
            "rope_theta": 1e4,
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
            "ngram_vocab_size_ratio": 3,
        },
    ),
    "baichuan_m1": (
        "baichuan_m1",
        {
            "rope_theta": 1e4,
            "sliding_window": 21,
            "sliding_window_layers": [1, 3],
            "conv_window": 2,
            "num_swa_key_value_heads": 4,
            "tie_word_embeddings": False,
        },
    ),
    "plamo2": (
        "plamo2",
        {
            "hidden_size_per_head": 16,
            "mamba_d_state": 16,
            "mamba_num_heads": 4,
            "full_attention_idx": [1, 3],
            "attention_window_size": 4096,
        },
    ),
}
ALL = {**FAMILIES, **RECURRENT}


def words() -> Any:
    """A tokenizer of the models' vocabulary, one word a token."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    return TokenizerWrapper(_words())


def _words() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(BASE["vocab_size"])}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def build(name: str, seed: int = 0, **more: Any) -> nn.Module:
    """Build a model of the family in float32, the same for the same seed. Sinks and norms are random too.

    `more` are further changes of its configuration.
    """
    module, changes = ALL[name]
    return build_other(module, {**changes, **more}, seed)


def build_other(module: str, changes: dict[str, Any], seed: int = 0) -> nn.Module:
    """Build a model of mlx-lm's `module` whose configuration differs from `BASE` by `changes`."""
    found = import_module(f"mlx_lm.models.{module}")
    return random_model(
        found.Model, found.ModelArgs, {**needed(found.ModelArgs), **BASE, "model_type": module, **changes}, seed
    )


def save(folder: Path, name: str = "llama", **more: Any) -> Path:
    """Write a model of the family into `folder` for `mlx_lm.load`, with the tokenizer of `words` and a chat template.

    `more` are further entries of its configuration. The transformers package gives "qwen3_5" a tokenizer of its own.
    """
    module, changes = ALL[name]
    tokenizer = _words()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**BASE, "model_type": module, **changes, **more}))
    save_weights(build(name), folder)
    return folder


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write a model's weights into `folder`."""
    weights: Any = tree_flatten(model.parameters())
    mx.save_safetensors(str(folder / "model.safetensors"), dict(weights), {"format": "mlx"})
