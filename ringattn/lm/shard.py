"""Sharding a model's context: the model stays as it is, and its layers' caches and attention are spread over a ring."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import ArgumentError, UnsupportedModelError
from ..ring.call import check_ring
from ..transport.base import Ring
from ..transport.interface import Transport
from ..transport.shared_input import SharedInput
from . import mlx_lm_compat as compat
from .mlx_lm_compat import Window
from .sharding.attention import dispatching
from .sharding.cache_list import LayerCache, ShardedCacheList, leaves
from .sharding.chunked_cache import Chunk, ShardedChunkedCache
from .sharding.history import TokenHistory
from .sharding.layer_adapters import wrapper_of
from .sharding.partition import Cost, next_step
from .sharding.ropes import longest_context
from .sharding.sharded_cache import ShardedKVCache, step_through
from .sharding.trial import TracingCache, trial_pass

REMEDY = "sample on one rank, as ringattn.lm.stream_generate does, or give all ranks the same mx.random.seed"
EXPERTS = 2  # of a mixture that work on one token, where the model does not say


class Sharded:
    """The class that `shard` puts before a model's own class."""

    ring: Transport
    weights: tuple[float, ...]
    cost: Cost
    windows: list[Window | tuple[Window, ...]]
    longest: float  # tokens of context

    def __call__(self, inputs: mx.array, cache: Sequence[Any] | None = None, **rest: Any) -> mx.array:
        """Run the model on `inputs`, which are the same on every rank. Collective where the caches are sharded.

        Returns:
            The logits of the tokens that this rank computed: for many tokens its chunk of them, otherwise all.
        """
        sharded = [c for c in leaves(cache or ()) if isinstance(c, ShardedKVCache)]
        if not sharded:
            return super().__call__(inputs, cache=cache, **rest)  # type: ignore[misc]
        # The few tokens of a layer with a window say little about which rank has room.
        fullest = max((c.layout for c in sharded), key=lambda layout: layout.length)
        step = next_step(fullest, inputs.shape[1], self.weights, self.cost)
        if step.new.stop > self.longest:
            name = compat.model_name(self)  # type: ignore[arg-type]
            raise UnsupportedModelError(
                f"model: {name} has a rope that depends on how many tokens come at once beyond {self.longest:,.0f} of "
                f"context, and this is token {step.new.stop:,}"
            )
        tokens = inputs
        shared = SharedInput("the model's input", inputs, REMEDY)
        if step.shared:
            ((start, stop),) = step.new.spans[self.ring.rank]
            own = slice(start - step.new.start, stop - step.new.start)
            inputs = inputs[:, own]
            if rest.get("input_embeddings") is not None:
                rest["input_embeddings"] = rest["input_embeddings"][:, own]
        for history in dict.fromkeys(c.history for c in sharded):
            history.write(step.new.start, tokens)
        with self.ring.sharing(shared), step_through(sharded, step):
            return super().__call__(inputs, cache=cache, **rest)  # type: ignore[misc]

    def make_cache(self) -> list[LayerCache]:
        """An empty cache, one for each layer."""
        history = TokenHistory()
        return _layer_caches(self.windows, lambda window: self._cache(window, history))

    def _cache(self, window: Window, history: TokenHistory) -> ShardedKVCache:
        kind = ShardedChunkedCache if isinstance(window, Chunk) else ShardedKVCache
        return kind(self.ring, window, history)


def shard(model: nn.Module, ring: Ring, weights: Sequence[float] | None = None) -> nn.Module:
    """Spread the context of `model` over `ring`: each rank keeps a part of the keys and values, and all the weights.

    The model is changed in place, as by mlx-lm's own `model.shard`. Its `make_cache` then returns sharded caches. A
    call with such a cache is collective, and every rank passes the same tokens. Many tokens are cut into one chunk a
    rank; few tokens are computed by every rank. With other caches, or none, the model works as before.

    Args:
        model: An mlx-lm model whose layers call mlx-lm's attention. Its weights are the same on every rank.
        ring: The ring, of `ringattn.init`.
        weights: The speed of each rank, one number a rank: its share of prefill and of the cache. Default: all equal.

    Returns:
        `model`.

    Raises:
        UnsupportedModelError: A layer or cache of the model cannot be sharded; the message names it.
    """
    ring = check_ring(ring)
    weights = (1.0,) * ring.size if weights is None else tuple(map(float, weights))
    if len(weights) != ring.size or not all(0 < w < float("inf") for w in weights):
        raise ArgumentError(f"weights: {weights}, expected {ring.size} finite numbers above 0, one a rank")
    windows = list(_windows(model))
    _patch_attention(model)
    kind = type(model).__mro__[2] if isinstance(model, Sharded) else type(model)
    longest = longest_context(trial_pass(model, kind, _layer_caches(windows, TracingCache)))
    if not isinstance(model, Sharded):
        model.__class__ = type(f"Sharded{kind.__name__}", (Sharded, kind), {"__module__": kind.__module__})
    for name, value in (
        ("ring", ring),
        ("weights", weights),
        ("windows", windows),
        ("cost", cost_of(model)),
        ("longest", longest),
    ):
        object.__setattr__(model, name, value)  # not as parameters
    return model


def _windows(model: nn.Module) -> Iterator[Window | tuple[Window, ...]]:
    """The window of each layer, also of a model that was sharded before."""
    return iter(model.windows) if isinstance(model, Sharded) else compat.layer_windows(model)


def _layer_caches(
    windows: Sequence[Window | tuple[Window, ...]], make: Callable[[Window], ShardedKVCache]
) -> list[LayerCache]:
    """A cache for each layer. `make` makes one for a window."""
    return [ShardedCacheList(*map(make, one)) if isinstance(one, tuple) else make(one) for one in windows]


def _patch_attention(model: nn.Module) -> None:
    """Replace the attention of the model's layers, in the modules of mlx-lm that define them.

    Calls without a sharded cache go on to mlx-lm's own function.
    """
    parts = {type(part): part for part in model.modules()}
    found = False
    for kind, part in parts.items():
        wrapper = wrapper_of(part)
        if wrapper is not None:
            compat.patch(kind, "__call__", wrapper)
            found = True
    for module in compat.defining_modules(model):
        if hasattr(module, compat.ATTENTION):
            compat.patch(module, compat.ATTENTION, dispatching)
            found = True
    if not found:
        name = compat.model_name(model)
        raise UnsupportedModelError(f"model: {name} has no layer that calls mlx-lm's {compat.ATTENTION}")


def cost_of(model: nn.Module) -> Cost:
    """Operations of one layer on a token: two for each weight that it meets, and those of a score and its value."""
    args = compat.model_args(model)
    layers = max(1, len(model.layers))
    experts = getattr(args, "num_experts_per_tok", None) or EXPERTS
    linear = 0.0
    for part in (part for layer in model.layers if layer is not None for part in layer.modules()):
        weight = part.get("weight") if isinstance(part, dict) else None
        if isinstance(weight, mx.array) and weight.ndim >= 2:
            size = weight.size * (32 // part.bits if hasattr(part, "bits") else 1)
            linear += 2 * size * (experts / weight.shape[0] if weight.ndim == 3 else 1)
    heads = getattr(args, "num_attention_heads", 0) or 0
    dim = getattr(args, "head_dim", None) or (getattr(args, "hidden_size", 0) // heads if heads else 0)
    return Cost(linear / layers, 4.0 * heads * dim)
