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
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
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
    module, changes = FAMILIES[name]
    return build_other(module, {**changes, **more}, seed)


def build_other(module: str, changes: dict[str, Any], seed: int = 0) -> nn.Module:
    """Build a model of mlx-lm's `module` whose configuration differs from `BASE` by `changes`."""
    found = import_module(f"mlx_lm.models.{module}")
    return random_model(
        found.Model, found.ModelArgs, {**needed(found.ModelArgs), **BASE, "model_type": module, **changes}, seed
    )


def save_llama(folder: Path, **more: Any) -> Path:
    """Write the model "llama" into `folder` for `mlx_lm.load`, with the tokenizer of `words` and a chat template.

    `more` are further entries of its configuration.
    """
    tokenizer = _words()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**BASE, "model_type": "llama", **more}))
    save_weights(build("llama"), folder)
    return folder


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write a model's weights into `folder`."""
    weights: Any = tree_flatten(model.parameters())
    mx.save_safetensors(str(folder / "model.safetensors"), dict(weights), {"format": "mlx"})
