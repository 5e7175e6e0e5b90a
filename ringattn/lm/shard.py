"""Sharding a model's context: the model stays as it is, what its layers cache and attend to is spread over a ring."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import ArgumentError, UnsupportedModelError
from ..layout import Layout
from ..ring.arguments import check_ring
from ..transport.base import Ring
from ..transport.interface import Transport
from ..transport.shared_input import SharedInput
from .attention import NAME, dispatching
from .history import TokenHistory
from .layer_adapters import ADAPTERS
from .partition import Cost, Step, next_step
from .ropes import RopeCall, longest_context, recorded_ropes
from .sharded_cache import Probe, ShardedKVCache, step_through

UNSUITABLE = {"mlx_lm.models.afm7": "counts the keys of its cache to find positions, and a rank has but a part of them"}
REMEDY = "sample on one rank, as ringattn.lm.stream_generate does, or give all ranks the same mx.random.seed"
EXPERTS = 2  # of a mixture that work on one token, where the model does not say


class Sharded:
    """What `shard` puts before a model's own class."""

    ring: Transport
    weights: tuple[float, ...]
    cost: Cost
    windows: list[int | None]
    longest: float  # tokens of context

    def __call__(self, inputs: mx.array, cache: Sequence[Any] | None = None, **rest: Any) -> mx.array:
        """As the model's own call, whose `inputs` are the same on every rank; with sharded caches it is collective.

        Returns:
            The logits of the tokens that this rank computed: for many tokens its chunk of them, otherwise all.
        """
        sharded = [c for c in cache or () if isinstance(c, ShardedKVCache)]
        if not sharded:
            return super().__call__(inputs, cache=cache, **rest)  # type: ignore[misc]
        # A window layer's few tokens say little about which rank has room.
        fullest = max((c.layout for c in sharded), key=lambda layout: layout.length)
        step = next_step(fullest, inputs.shape[1], self.weights, self.cost)
        if step.new.stop > self.longest:
            name = _name(self)  # type: ignore[arg-type]
            raise UnsupportedModelError(
                f"model: {name} has a rope that depends on how many tokens come at once beyond {self.longest:,.0f} of "
                f"context, and this is token {step.new.stop:,}"
            )
        tokens, shared = inputs, SharedInput("the model's input", inputs, REMEDY)
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

    def make_cache(self) -> list[ShardedKVCache]:
        """An empty cache, one for each layer."""
        history = TokenHistory()
        return [ShardedKVCache(self.ring, window, history) for window in self.windows]


def shard(model: nn.Module, ring: Ring, weights: Sequence[float] | None = None) -> nn.Module:
    """Have `model` spread its context over `ring`: each rank keeps a part of the keys and values, all have the weights.

    The model is changed in place, as by mlx-lm's own `model.shard`. Its `make_cache` then gives sharded caches; a call
    with one is collective, and every rank passes the same tokens. Of many tokens each rank computes one chunk, of a few
    all. With other caches, or none, the model does what it did before.

    Args:
        model: An mlx-lm model whose layers call mlx-lm's attention. Its weights are the same on every rank.
        ring: The ring, of `ringattn.init`.
        weights: How fast the ranks are, one number each: their shares of prefill and of the cache. Default: all alike.

    Returns:
        `model`.

    Raises:
        UnsupportedModelError: A layer or cache of the model cannot be sharded. It names which.
    """
    ring = check_ring(ring)
    weights = (1.0,) * ring.size if weights is None else tuple(map(float, weights))
    if len(weights) != ring.size or not all(0 < w < float("inf") for w in weights):
        raise ArgumentError(f"weights: {weights}, expected {ring.size} finite numbers above 0, one a rank")
    windows = list(_windows(model))
    _rebind(model)
    longest = longest_context(_probe(model, windows))
    kind = type(model)
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


def _windows(model: nn.Module) -> Iterator[int | None]:
    """The window of each layer, by the cache that the model itself would make for it."""
    from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

    if isinstance(model, Sharded):
        yield from model.windows
        return
    for i, cache in enumerate(make_prompt_cache(model)):
        if type(cache) is KVCache:
            yield None
        elif type(cache) is RotatingKVCache and cache.keep == 0:
            yield cache.max_size
        else:
            raise UnsupportedModelError(
                f"model: {_name(model)} has a {type(cache).__name__} at layer {i}, expected KVCache or "
                "RotatingKVCache: its state cannot be spread over a ring"
            )


def _probe(model: nn.Module, windows: Sequence[int | None]) -> list[RopeCall]:
    """See whether each layer attends to what its cache, or another layer's, gave it, and which ropes are called.

    Nothing is evaluated.
    """
    if type(model).__module__ in UNSUITABLE:
        raise UnsupportedModelError(f"model: {_name(model)} {UNSUITABLE[type(model).__module__]}")
    caches = [Probe(window) for window in windows]
    kind = type(model).__mro__[2] if isinstance(model, Sharded) else type(model)
    try:
        with recorded_ropes(model) as calls, step_through(caches, Step(Layout((((0, 2),),)), False)):
            kind.__call__(model, mx.zeros((1, 2), mx.int32), cache=caches)
    except ArgumentError as error:
        raise UnsupportedModelError(f"model: {_name(model)} has a layer of another kind: {error}") from None
    return calls


def _name(model: nn.Module) -> str:
    return str(getattr(model, "model_type", type(model).__module__.rpartition(".")[2]))


def _rebind(model: nn.Module) -> None:
    """Point the attention of the model's layers to ours, in the modules that they are defined in.

    What is not called with a sharded cache goes on to mlx-lm's.
    """
    kinds = {type(part) for part in model.modules()}
    modules = {kind.__module__ for kind in kinds if kind.__module__.startswith("mlx_lm.")}
    adapted = {key: kind for kind in kinds if (key := (kind.__module__, kind.__name__)) in ADAPTERS}
    for key, kind in adapted.items():
        _adapt(kind, key)
    found = False
    for name in sorted(modules):
        module = sys.modules[name]
        if any(key[0] == name for key in adapted):
            found = True
        elif hasattr(module, NAME):
            _check_masks(model, module)
            if not hasattr(getattr(module, NAME), "plain"):
                setattr(module, NAME, dispatching(getattr(module, NAME)))
            found = True
    if not found:
        raise UnsupportedModelError(f"model: {_name(model)} has no layer that calls mlx-lm's {NAME}")


def _check_masks(model: nn.Module, module: Any) -> None:
    """No layer may want the mask as an array of all columns, which no rank has."""
    if "return_array=True" in inspect.getsource(module):
        raise UnsupportedModelError(
            f"model: {_name(model)} does arithmetic on its mask ({module.__name__}), and there is no adapter for it"
        )


def _adapt(kind: type, key: tuple[str, str]) -> None:
    """Give a layer's class the adapter for its calls with a sharded cache."""
    plain: Any = kind.__call__
    if hasattr(plain, "plain"):
        return

    def call(layer: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        run = partial(ADAPTERS[key], layer) if isinstance(cache, ShardedKVCache) else partial(plain, layer)
        return run(x, mask, cache)

    call.plain = plain  # type: ignore[attr-defined]
    setattr(kind, "__call__", call)  # noqa: B010


def cost_of(model: nn.Module) -> Cost:
    """Operations of one layer on a token: two for each weight that it meets, and those of a score and its value."""
    args = getattr(model, "args", None)
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
