"""Models of the comparison, and the text that they read."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

import ringattn as ra  # before MLX, for its BLAS
from ringattn import lm

import mlx.core as mx  # isort: skip
import mlx.nn as nn  # isort: skip

SMOLLM2 = "smollm2"
LARGER = "larger"
LONGEST = {SMOLLM2: 8192, LARGER: 32768}  # tokens of context
LAYERS = 4
# Shapes of Qwen2.5-1.5B, which has 28 layers, with SmolLM2's vocabulary. mlx-lm can pipeline this class.
CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def load(name: str) -> tuple[nn.Module, Any, mx.array]:
    """Model in float32, tokenizer without an end of text, and the ids of a long text.

    The random weights are not evaluated: a host then computes those alone that it keeps.
    """
    mx.set_default_device(mx.cpu)
    model, tokenizer = lm.load(SMOLLM2, mx.float32)
    tokenizer.eos_token_ids = []
    if name != SMOLLM2:
        from mlx_lm.models.qwen2 import Model, ModelArgs

        mx.random.seed(0)
        model = Model(ModelArgs.from_dict(CONFIG))
    ids = mx.array(tokenizer.encode("\n\n".join(topics.values())[:200_000]))
    assert ids.size > LONGEST[LARGER] // 2, ids.size
    return model, tokenizer, ids


def use_fused_attention(model: nn.Module) -> None:
    """Let the model's class call ringattn's fused attention: MLX has none on a CPU, and has one on a Mac.

    Of a prompt's chunk only the caches are read. MLX's attention, which is lazy, is then not computed in the last
    layer. ringattn's is computed at once, so that layer gets zeros, which nothing reads. The last token of a prompt is
    read alone.
    """
    import sys

    module = sys.modules[type(model).__module__]
    last = model.layers[-1]
    kind = type(last)
    running = False

    class Last(kind):
        def __call__(self, *args, **options):
            nonlocal running
            running = True
            try:
                return super().__call__(*args, **options)
            finally:
                running = False

    last.__class__ = Last

    def attend(queries, keys, values, cache, scale, mask, sinks=None):
        if running and queries.shape[2] > 1:
            return mx.zeros((*queries.shape[:-1], values.shape[-1]), queries.dtype)
        return ra.attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)

    module.scaled_dot_product_attention = attend
