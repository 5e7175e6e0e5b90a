"""A trial pass refuses what would be silently wrong over a ring, before anything is computed."""

from __future__ import annotations

import os
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import pytest

if "CI" not in os.environ:
    pytest.importorskip("mlx_lm")

import families

from ringattn import init, lm
from ringattn.lm.sharding.trial import HELD, STEP


def own_softmax(layer: nn.Module, x: mx.array, mask=None, cache=None) -> mx.array:
    """Attention that ignores its mask and calls no function of mlx-lm."""
    q, k = (part(x).reshape(*x.shape[:2], 2, -1).swapaxes(1, 2) for part in (layer.k_proj, layer.v_proj))
    k, v = cache.update_and_fetch(k, k)
    out = mx.softmax(q @ k.swapaxes(-1, -2), axis=-1) @ v
    return x + out.sum()


def own_mask(layer: nn.Module, x: mx.array, mask=None, cache=None) -> mx.array:
    """Attention with arithmetic on its mask."""
    return x + mx.where(mask, 0.0, -1.0).sum()


def counted(layer: nn.Module, x: mx.array, mask=None, cache=None) -> mx.array:
    """Attention that finds positions from the number of keys."""
    k, v = (part(x).reshape(*x.shape[:2], 2, -1).swapaxes(1, 2) for part in (layer.k_proj, layer.v_proj))
    k, v = cache.update_and_fetch(k, v)
    q = layer.rope(k[:, :, -x.shape[1] :], offset=k.shape[2] - x.shape[1])
    out = patched_attention(q, k, v, cache=cache, scale=1.0, mask=mask)
    return x + out.sum()


def patched_attention(*args, **kwargs) -> mx.array:
    """The attention of the patched module."""
    from mlx_lm.models import llama

    return llama.scaled_dot_product_attention(*args, **kwargs)


@pytest.mark.parametrize(
    "layer, reason",
    [
        (own_softmax, "has a layer that uses the keys of cache 0 otherwise than in mlx-lm's attention"),
        (own_mask, r"has a layer that does its own arithmetic on masks or caches \(ValueError\)"),
        (counted, "counts the keys of a cache to find positions"),
    ],
)
def test_what_a_ring_does_not_allow(monkeypatch: pytest.MonkeyPatch, layer: Callable, reason: str) -> None:
    model = families.build("llama")
    monkeypatch.setattr(type(model.layers[0].self_attn), "__call__", layer)
    with init("solo") as ring, pytest.raises(lm.UnsupportedModelError, match=rf"^model: llama {reason}[^\n]*$"):
        lm.shard(model, ring)


def test_the_pass_is_like_one_on_a_rank() -> None:
    """A rank holds fewer tokens than came before: otherwise a count of keys would look right."""
    assert HELD.length < HELD.stop == STEP.new.start


def test_a_model_that_was_refused_still_works_on_one_process() -> None:
    model = families.build_other("phi3small", {"vocab_size": 100_352, **PHI3SMALL})
    expected = model(mx.zeros((1, 3), mx.int32))
    with init("solo") as ring, pytest.raises(lm.UnsupportedModelError):
        lm.shard(model, ring)
    assert mx.array_equal(model(mx.zeros((1, 3), mx.int32)), expected)


PHI3SMALL = {"ff_intermediate_size": 64, "dense_attention_every_n_layers": 2, "gegelu_limit": 20.0, "hidden_size": 64}
