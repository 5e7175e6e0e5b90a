"""Short convolutions of recurrent layers over a ring: a rank needs the last inputs of the tokens before its own."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...errors import UnsupportedModelError
from ...ring.states import chain_inputs
from .recurrences import reading_cache
from .recurrent_cache import RecurrentCache, TracingRecurrentCache


class RingConv1d(nn.Conv1d):
    """The class that `shard` gives to a causal depthwise convolution whose inputs mlx-lm keeps in a cache."""

    def __call__(self, x: mx.array) -> mx.array:
        """Convolve x ``[batch, kernel - 1 + tokens, channels]``; the first inputs are those of the cache."""
        cache = reading_cache()
        if cache is not None:
            x = with_inputs_before(cache, x, self.weight.shape[1] - 1)
        return super().__call__(x)


def with_inputs_before(cache: RecurrentCache, x: mx.array, halo: int) -> mx.array:
    """Replace the first `halo` inputs, which the layer took from its cache, by those before this rank's tokens.

    Args:
        cache: The layer's cache. It gets the last inputs of all tokens.
        x: The inputs ``[batch, halo + tokens, channels]``.
        halo: The number of inputs before a token that have a weight.
    """
    if isinstance(cache, TracingRecurrentCache):
        cache.note_inputs((x.shape[0], halo, x.shape[2]))
    order = cache.convolutions
    cache.convolutions += 1
    if not cache.shared:
        return x
    assert cache.step is not None
    what = "a short convolution"
    own = x[:, halo:]
    with cache.ring.call(what):
        (before,), after = chain_inputs(cache.ring, what, cache.step.new, x[:, :halo], own)
    cache.store_inputs(order, after)
    return mx.concatenate([before, own], axis=1)


def patch_convolutions(model: nn.Module) -> None:
    """Give the class `RingConv1d` to the causal depthwise convolutions of `model`."""
    for part in model.modules():
        if type(part) is nn.Conv1d and part.groups == part.weight.shape[0] and part.weight.shape[1] > 1:
            plain: Any = (part.padding, part.stride, part.dilation)
            if plain != (0, 1, 1):
                raise UnsupportedModelError(
                    f"padding, stride and dilation {plain} of a convolution, expected (0, 1, 1)"
                )
            part.__class__ = RingConv1d
