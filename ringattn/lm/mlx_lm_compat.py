"""The one module that knows mlx-lm from the inside: what the package imports, reads and patches there, and which
versions of mlx-lm were tested.

Other modules use only mlx-lm's documented interface directly: the functions that `mlx_lm` exports, and
`mlx_lm.sample_utils`. This module does not import mlx-lm before a name from it is used.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from functools import reduce
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

OLDEST = "0.32.2"  # the first version of mlx-lm that was tested
BOUND = "0.33"  # the first version that was not; the extra `lm` in pyproject.toml has the same two


ATTENTION = "scaled_dot_product_attention"  # the function of mlx_lm.models.base that its models import

# Names outside the documented interface, and the modules that have them.
IMPORTED = {
    "KVCache": "mlx_lm.models.cache",
    "RotatingKVCache": "mlx_lm.models.cache",
    "ArraysCache": "mlx_lm.models.cache",
    "CacheList": "mlx_lm.models.cache",
    "ChunkedKVCache": "mlx_lm.models.cache",
    "make_prompt_cache": "mlx_lm.models.cache",
    ATTENTION: "mlx_lm.models.base",
    "Llama": "mlx_lm.models.llama:Model",
    "LlamaArgs": "mlx_lm.models.llama:ModelArgs",
    "TokenizerWrapper": "mlx_lm.tokenizer_utils",
    "BPEStreamingDetokenizer": "mlx_lm.tokenizer_utils",
    "compute_dt": "mlx_lm.models.ssm",
    "JambaMambaMixer": "mlx_lm.models.jamba",
    "dequantize_model": "mlx_lm.utils",
    "_get_classes": "mlx_lm.utils",
    "load_model": "mlx_lm.utils",
    "generate_step": "mlx_lm.generate",
    "GenerationResponse": "mlx_lm.generate",
    "TextStateMachine": "mlx_lm.generate",
    "make_text_state_machine": "mlx_lm.generate",
    "ToolCallFormatter": "mlx_lm.server",
    "convert_chat": "mlx_lm.server",
    "get_system_fingerprint": "mlx_lm.server",
    "process_message_content": "mlx_lm.server",
}

# Parameters that calls name.
PARAMETERS = {
    ATTENTION: ("queries", "keys", "values", "cache", "scale", "mask", "sinks"),
    "generate_step": ("max_tokens", "sampler", "logits_processors", "prompt_progress_callback", "prefill_step_size")
    + ("prompt_cache",),
    "GenerationResponse": ("text", "token", "logprobs", "finish_reason")
    + ("prompt_tokens", "prompt_tps", "generation_tokens", "generation_tps"),
    "ToolCallFormatter": ("tool_parser", "tools", "streaming"),
}

# Attributes of classes that are read or called.
ATTRIBUTES = {
    "ChunkedKVCache": ("maybe_trim_front",),
    "KVCache": ("size", "update_and_fetch", "make_mask", "is_trimmable", "trim"),
    "RotatingKVCache": ("size",),
    "TextStateMachine": ("make_state", "split", "flush"),
    "TokenizerWrapper": ("apply_chat_template", "add_eos_token", "eos_token_ids", "tool_parser", "has_thinking")
    + ("rfind_think_start", "rfind_think_end", "response_initial_state"),
}

# Attention layers that `sharding.layer_adapters` runs by code of its own, by module and class, and the attributes
# that it reads.
LAYERS = {
    ("mlx_lm.models.gemma2", "Attention"): ("q_proj", "k_proj", "v_proj", "o_proj", "rope", "scale")
    + ("n_heads", "n_kv_heads", "attn_logit_softcapping"),
    ("mlx_lm.models.deepseek_v32", "Indexer"): ("wq_b", "wk", "k_norm", "weights_proj", "rope", "n_heads")
    + ("softmax_scale", "index_topk"),
}

# Methods of recurrent layers that `sharding.patch_points` replaces or calls, by module and class.
METHODS = {
    ("mlx_lm.models.rwkv7", "Rwkv7TimeMixing", "_wkv7"),
    ("mlx_lm.models.rwkv7", "TokenShift", "__call__"),
    ("mlx_lm.models.jamba", "JambaMambaMixer", "ssm_step"),
    ("mlx_lm.models.mamba", "MambaBlock", "ssm_step"),
    ("mlx_lm.models.mamba", "MambaBlock", "_process_sequence"),
    ("mlx_lm.models.recurrent_gemma", "Conv1d", "__call__"),
    ("mlx_lm.models.recurrent_gemma", "RGLRU", "__call__"),
    ("mlx_lm.models.kimi_k3", "KimiK3DeltaAttention", "__call__"),
    ("mlx_lm.models.kimi_k3", "KimiK3DeltaAttention", "_decode_core"),
    ("mlx_lm.models.longcat_flash_ngram", "NgramEmbedding", "__call__"),
    ("mlx_lm.models.baichuan_m1", "Attention", "_custom_convolution"),
}


def __getattr__(name: str) -> Any:
    """Import one of the names of `IMPORTED` when it is used."""
    if name not in IMPORTED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, there = IMPORTED[name].partition(":")
    return getattr(import_module(module), there or name)


def version_problem() -> str | None:
    """One line that says that the installed mlx-lm was not tested; ``None`` where it was."""
    found = version("mlx-lm")
    if _numbers(OLDEST) <= _numbers(found) < _numbers(BOUND):
        return None
    return (
        f"mlx-lm {found} is installed, and ringattn was tested with {OLDEST} and later versions below {BOUND}: "
        f"pip install 'mlx-lm>={OLDEST},<{BOUND}'"
    )


def missing_names() -> list[str]:
    """The names of `IMPORTED`, `PARAMETERS`, `ATTRIBUTES`, `LAYERS` and `METHODS` that the installed mlx-lm lacks."""
    missing = []
    for name, module in IMPORTED.items():
        try:
            found = __getattr__(name)
        except (ImportError, AttributeError):
            missing.append(f"{name} in {module}")
            continue
        parameters = inspect.signature(found).parameters if name in PARAMETERS else {}
        missing += [f"parameter {one} of {name}" for one in PARAMETERS.get(name, ()) if one not in parameters]
        missing += [f"attribute {one} of {name}" for one in ATTRIBUTES.get(name, ()) if not hasattr(found, one)]
    for module, *names in (*LAYERS, *sorted(METHODS)):
        try:
            reduce(getattr, names, import_module(module))
        except (ImportError, AttributeError):
            missing.append(f"{'.'.join(names)} in {module}")
    return missing


def model_classes(config: dict[str, Any]) -> tuple[Any, Any]:
    """The class of the model with a configuration, and that of its arguments."""
    model, arguments = __getattr__("_get_classes")(config)
    return model, arguments


def model_args(model: nn.Module) -> Any:
    """The arguments that an mlx-lm model or a part of it was made from; ``None`` where it has none."""
    return getattr(model, "args", None)


def model_name(model: nn.Module) -> str:
    """The name of a model's family, for messages."""
    return str(getattr(model, "model_type", type(model).__module__.rpartition(".")[2]))


def is_mixture(part: nn.Module) -> bool:
    """Whether a part of a model holds the weights of many experts, of which a token meets a few."""
    return "SwitchLinear" in type(part).__name__


def score_dim(args: Any, heads: int) -> float:
    """The mean dimension of a head's products with a key and with a value, by the arguments of a model."""
    if (rank := getattr(args, "kv_lora_rank", None)) is not None:  # latent vectors are keys and values of all heads
        return float(rank + getattr(args, "qk_rope_head_dim", 0) / 2)
    return float(getattr(args, "head_dim", None) or (getattr(args, "hidden_size", 0) / heads if heads else 0))


def defining_modules(model: nn.Module) -> list[ModuleType]:
    """The modules of mlx-lm that define the model's parts, by name."""
    names = {type(part).__module__ for part in model.modules()}
    return [sys.modules[name] for name in sorted(names) if name.startswith("mlx_lm.")]


def has_delta_kernel(k: mx.array) -> bool:
    """Whether mlx-lm's `gated_delta_update` runs a kernel for keys `k`, and not one token after the other."""
    return mx.metal.is_available() and mx.default_device() == mx.gpu and k.shape[-1] % 32 == 0


def calls_fast_attention(module: ModuleType) -> bool:
    """Whether a model's code calls the attention of ``mx.fast``, and not mlx-lm's function around it."""
    return f"mx.fast.{ATTENTION}" in inspect.getsource(module)


def patch(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """Put ``wrap(x)`` in the place of `name`, x, of a module or class, unless that was done before."""
    plain = getattr(owner, name)
    if hasattr(plain, "plain"):
        return
    wrapped = wrap(plain)
    wrapped.plain = plain
    setattr(owner, name, wrapped)


def _numbers(text: str) -> tuple[int, ...]:
    """The numbers of a version's release; a pre-release counts as its release."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])
