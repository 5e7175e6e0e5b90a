"""Ropes of any class are judged by their results for tokens in one call and in several."""

from __future__ import annotations

import os
from typing import Any

import families
import mlx.core as mx
import mlx.nn as nn
import pytest

from ringattn import init

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

from ringattn import lm

LONG = {"original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "scaling, longest",
    [
        (None, float("inf")),
        ({"type": "linear", "factor": 2.0}, float("inf")),
        ({"type": "llama3", "factor": 8.0}, float("inf")),
        ({"type": "yarn", "factor": 4.0, **LONG}, float("inf")),
        ({"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, **LONG}, float("inf")),
        ({"type": "dynamic", "factor": 2.0}, 100),
        ({"type": "dynamic", "factor": 1.0}, 100),
    ],
)
def test_scalings_of_mlx_lm(scaling: dict | None, longest: float) -> None:
    model = families.build("llama", max_position_embeddings=100, rope_scaling=scaling)
    assert lm.shard(model, init("solo")).longest == longest


def test_a_limit_far_out() -> None:
    """One token more changes the angles only slightly there."""
    scaling = {"type": "dynamic", "factor": 1.0}
    model = families.build("llama", max_position_embeddings=131072, rope_theta=1e6, rope_scaling=scaling)
    assert lm.shard(model, init("solo")).longest == 131072


class Follows(nn.Module):
    """A rope whose base depends on the number of tokens in a call."""

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        base = 10000.0 * x.shape[-2]
        return mx.fast.rope(x, 16, traditional=False, base=base, scale=1.0, offset=offset)


class Plain(nn.Module):
    """A correct rope that takes its offset by name only."""

    def __call__(self, x: mx.array, *, offset: int = 0) -> mx.array:
        return mx.fast.rope(x, 16, traditional=False, base=10000.0, scale=1.0, offset=offset)


def own_rope_of_internlm3() -> nn.Module:
    """Build a rope that takes the number of heads for that of tokens, so that its base changes before its limit."""
    from mlx_lm.models.internlm3 import DynamicNTKScalingRoPE

    return DynamicNTKScalingRoPE(16, max_position_embeddings=64, scale=2.0)


@pytest.mark.parametrize("make, longest", [(Follows, 1), (Plain, float("inf")), (own_rope_of_internlm3, 64 - 4 + 1)])
def test_a_rope_of_a_familys_own(make: Any, longest: float) -> None:
    model = families.build("llama")
    model.layers[2].self_attn.rope = make()
    lm.shard(model, init("solo"))
    assert model.longest == longest
    if longest < float("inf"):
        cache = model.make_cache()
        model(mx.zeros((1, int(longest)), mx.int32), cache=cache)
        with pytest.raises(lm.UnsupportedModelError, match=rf"beyond {longest} of context, and this is token"):
            model(mx.zeros((1, 1), mx.int32), cache=cache)


def test_the_classes_of_ropes_are_left_as_they_were() -> None:
    before = nn.RoPE.__call__
    lm.shard(families.build("llama"), init("solo"))
    assert nn.RoPE.__call__ is before


def test_a_layer_with_an_offset_is_no_rope() -> None:
    """Attention of gemma4 takes an offset beside its cache."""
    assert lm.shard(families.build("gemma4, shared keys"), init("solo")).longest == float("inf")
