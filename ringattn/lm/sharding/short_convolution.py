"""Short convolutions and the like over a ring: a rank needs the last inputs of the tokens before its own."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...errors import UnsupportedModelError
from ...ring.states import chain_inputs
from .recurrent_cache import RecurrentCache, TracingRecurrentCache
from .running_layer import Run, reading_cache


class RingConv1d(nn.Conv1d):
    """The class that `shard` gives to a causal depthwise convolution whose inputs mlx-lm keeps in a cache."""

    def __call__(self, x: mx.array) -> mx.array:
        """Convolve x ``[batch, kernel - 1 + tokens, channels]``; the first inputs are those of the cache."""
        cache = reading_cache()
        if cache is not None:
            halo = self.weight.shape[1] - 1
            before = inputs_before(cache, x[:, :halo], x[:, halo:])
            x = mx.concatenate([before, x[:, halo:]], axis=1) if cache.shared else x
        return super().__call__(x)


def inputs_before(cache: RecurrentCache, held: mx.array, own: mx.array, axis: int = 1) -> mx.array:
    """Find the inputs of a short convolution just before this rank's tokens. Collective where tokens are spread.

    Args:
        cache: The layer's cache. It gets the last inputs of all tokens.
        held: The inputs before the forward pass, which the layer took from its cache: ``[batch, halo, channels]``, as
            many as have a weight. There may be more axes.
        own: The inputs of this rank's tokens, of the shape of `held` except for the number of tokens.
        axis: The axis of tokens.

    Returns:
        An array of the shape of `held`.
    """
    if isinstance(cache, TracingRecurrentCache):
        cache.note_inputs(held.shape)
    order = cache.convolutions
    cache.convolutions += 1
    if not cache.shared:
        return held
    assert cache.step is not None
    first = held.swapaxes(1, axis)
    last = own.swapaxes(1, axis)
    what = "a short convolution"
    with cache.ring.call(what):
        (before,), after = chain_inputs(cache.ring, what, cache.step.new, first.flatten(2), last.flatten(2))
    cache.store_inputs(order, after.reshape(first.shape).swapaxes(1, axis))
    return before.reshape(first.shape).swapaxes(1, axis)


def token_shift(plain: Run, cache: RecurrentCache, layer: nn.Module, x: mx.array, state: mx.array | None) -> mx.array:
    """Run RWKV's `TokenShift`: the input of the token before, x ``[batch, tokens, channels]``."""
    held = mx.zeros_like(x[:, :1]) if state is None else state
    return plain(layer, x, inputs_before(cache, held, x))


def padding_conv1d(
    plain: Run, own: RecurrentCache, layer: Any, /, x: mx.array, cache: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Run Griffin's `Conv1d`, which puts the inputs of its cache before x ``[batch, tokens, channels]`` itself."""
    shape = x.shape[0], layer.weight.shape[1] - 1, x.shape[2]
    return plain(layer, x, inputs_before(own, mx.zeros(shape, x.dtype) if cache is None else cache, x))


def convolution_of_heads(
    plain: Run, cache: RecurrentCache, layer: nn.Module, u: mx.array, weights: mx.array, state: mx.array | None
) -> mx.array:
    """Run Baichuan M1's convolution of keys or values, u ``[batch, heads, tokens, head_dim]``, over two tokens."""
    held = mx.zeros_like(u[:, :, :1]) if state is None else state
    return plain(layer, u, weights, inputs_before(cache, held, u, axis=2))


def ngram_embedding(plain: Run) -> Run:
    """Wrap LongCat's `NgramEmbedding`: a token's vector depends on its id and on those of a few tokens before it.

    Missing ids are zero in it. So the cache may hold as many ids as a later token needs, from the first call on.
    """

    def call(layer: Any, ids: mx.array, cache: Any = None) -> mx.array:
        if not isinstance(cache, RecurrentCache):
            return plain(layer, ids, cache)
        held = cache[0]
        if held is None:
            held = mx.zeros((ids.shape[0], layer.n - 1, 1), mx.int64)
        kept = [inputs_before(cache, held, ids.astype(mx.int64)[..., None])[..., 0]]
        out = plain(layer, ids, kept)
        cache[0] = kept[0][..., None]
        return out

    return call


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
