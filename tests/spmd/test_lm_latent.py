"""Layers of latent attention, alone, from families whose other layers are of another kind."""

from __future__ import annotations

import os

import mlx.core as mx
import numpy as np
import pytest

from ringattn import Ring

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

import sys

from every_family import build
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache

from ringattn import lm
from ringattn.lm import mlx_lm_compat as compat
from ringattn.lm.sharding.attention import dispatching
from ringattn.lm.sharding.forward_pass import step_through
from ringattn.lm.sharding.latent import ATTRIBUTES
from ringattn.lm.sharding.layer_adapters import wrapper_of
from ringattn.lm.sharding.partition import Cost, next_step

pytestmark = pytest.mark.two_ranks

FAMILIES = ("bailing_hybrid", "bailing_moe_v3", "kimi_k3", "kimi_linear")  # without a rope, with gates, other names


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer(ring: Ring, rng: np.random.Generator, family: str) -> None:
    layer = next(part for part in build(family).modules() if all(hasattr(part, name) for name in ATTRIBUTES))
    wrapper = wrapper_of(layer)
    assert wrapper is not None
    compat.patch(type(layer), "__call__", wrapper)
    compat.patch(sys.modules[type(layer).__module__], compat.ATTENTION, dispatching)
    plain, sharded = KVCache(), lm.ShardedKVCache(ring)
    for tokens in (90, 1, 3, 70, 1):
        x = mx.array(rng.normal(size=(1, tokens, 64)).astype(np.float32))
        expected = layer(x, create_attention_mask(x, plain, return_array=True), plain)
        step = next_step(sharded.layout, tokens, (1.0,) * ring.size, Cost(1e4, 100.0))
        if step.shared:
            x, expected = (step.new.shard(whole, ring.rank, axis=1) for whole in (x, expected))
        with step_through([sharded], step):
            found = layer(x, sharded.make_mask(tokens), sharded)
        assert mx.abs(found - expected).max() < 32 * 2**-23 * mx.abs(expected).max()
