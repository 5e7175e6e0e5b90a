"""Configurations to predict and to run, and those by which the rates are measured."""

from __future__ import annotations

from typing import NamedTuple

import ringattn as ra  # before MLX, for its BLAS

import mlx.core as mx  # isort: skip
import mlx.nn as nn  # isort: skip

assert ra
SMALL, LARGE = 384, 1024  # tokens of the calls by which the rates are measured
SHORT = (256, 512)  # tokens of the prompts by which the rates are measured
DECODED = (2048, 16384)  # keys of a new token by which the rate of reading keys is measured
DECODES = 8  # calls in a row
STEPS = 8  # new tokens
REPEATS = 5  # of the rates
TURNS = 3  # of the configurations
CONFIG = {  # mlx-lm divides its weights as well as its layers
    "model_type": "qwen2",
    "hidden_size": 768,
    "num_hidden_layers": 6,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
}

THIN = {"intermediate_size": 512}  # of a model whose token shows what does not depend on the weights


class Call(NamedTuple):
    """A call of ring attention: its tokens, heads and mask."""

    tokens: int
    heads: int
    kv_heads: int
    dim: int
    mask: str

    @property
    def name(self) -> str:
        return f"{self.tokens} tokens, {self.heads}/{self.kv_heads} x {self.dim}, {self.mask}"


class Run(NamedTuple):
    """A model that reads a prompt: tokens, ranks in a row, stages, and tokens of a rank in a round (0: the rule)."""

    tokens: int
    tensor: int = 1
    stages: int = 1
    chunk: int = 0

    @property
    def name(self) -> str:
        if self.stages > 1:
            return f"{self.tokens} tokens, pipeline"
        way = {1: "ring", 2: "rows of 2"}[self.tensor]
        return f"{self.tokens} tokens, {way}{f', rounds of {self.chunk}' if self.chunk else ''}"


CALLS = (
    Call(5632, 6, 3, 64, "causal"),
    Call(4608, 4, 2, 128, "causal"),
    Call(4352, 8, 2, 64, "full"),
    Call(3840, 4, 4, 128, "full"),
)
PROMPTS = (1344, 3200)


def runs(hosts: int) -> list[Run]:
    """The runs of a model on so many hosts."""
    found = [Run(tokens, tensor) for tensor in (1, 2) for tokens in PROMPTS]
    found.append(Run(PROMPTS[1], chunk=400))
    return [*found, *(Run(tokens, stages=2) for tokens in PROMPTS)] if hosts == 2 else found


def make_model(**changed: int) -> nn.Module:
    """The model, with the same random weights in every call, or one with another configuration."""
    from mlx_lm.models.qwen2 import Model, ModelArgs

    mx.random.seed(0)
    return Model(ModelArgs.from_dict({**CONFIG, **changed}))
