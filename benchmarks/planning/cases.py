"""Configurations to predict and to run, and those by which the rates are measured."""

from __future__ import annotations

from typing import NamedTuple

import ringattn as ra  # before MLX, for its BLAS

import mlx.core as mx  # isort: skip

from ..common import small_llama

assert ra
SMALL, LARGE = 384, 1024  # tokens of the calls by which the rates are measured
SHORT = (256, 512)  # tokens of the prompts by which the rates are measured
CHUNK = 512  # tokens of a rank in a round
DECODES = 8  # calls in a row
STEPS = 6  # new tokens
REPEATS = 4
CONFIG = small_llama(8)


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


CALLS = (
    Call(4096, 8, 8, 64, "causal"),
    Call(4096, 8, 2, 128, "full"),
    Call(6144, 8, 2, 64, "causal"),
    Call(3072, 4, 4, 128, "full"),
)
PROMPTS = (1024, 3072)  # tokens; a new token follows


def make_model():
    """The model, with the same random weights in every call."""
    from mlx_lm.models.llama import Model, ModelArgs

    mx.random.seed(0)
    return Model(ModelArgs.from_dict(CONFIG))
