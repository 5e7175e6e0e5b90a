"""Sharding a model's context: the model stays as it is, and its layers' caches and attention are spread over a ring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import ArgumentError, UnsupportedModelError
from ..layout import Layout
from ..ring.call import check_ring
from ..transport.base import Ring
from ..transport.consensus import agree
from ..transport.grid import Grid
from ..transport.interface import Transport
from ..transport.shared_input import SharedInput
from . import mlx_lm_compat as compat
from .sharding.attention import dispatching
from .sharding.history import TokenHistory
from .sharding.layer_adapters import ADAPTERS
from .sharding.partition import Cost, Step, next_step
from .sharding.ropes import RopeCall, longest_context, recorded_ropes
from .sharding.sharded_cache import ShardedKVCache, TracingCache, step_through
from .sharding.weights import check_no_pipeline, evaluate_weights, group_of, shard_weights

REMEDY = "sample on one rank, as ringattn.lm.stream_generate does, or give all ranks the same mx.random.seed"
EXPERTS = 2  # of a mixture that work on one token, where the model does not say


class Sharded:
    """The class that `shard` puts before a model's own class.

    Attributes:
        ring: The ring over which the context is spread.
        everyone: The ring of all ranks that have a part of the model; ``None`` where it is not known.
        part: The rank's part of the weights and the number of parts, ``(0, 1)`` where each rank has all of them.
        weights: The speed of each rank of `ring`.
    """

    ring: Transport
    everyone: Transport | None
    part: tuple[int, int]
    weights: tuple[float, ...]
    cost: Cost
    windows: list[int | None]
    longest: float  # tokens of context

    def __call__(self, inputs: mx.array, cache: Sequence[Any] | None = None, **rest: Any) -> mx.array:
        """Run the model on `inputs`, which are the same on every rank. Collective where the caches are sharded.

        Returns:
            The logits of the tokens that this rank computed: for many tokens its chunk of them, otherwise all.
        """
        sharded = [c for c in cache or () if isinstance(c, ShardedKVCache)]
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

    def make_cache(self) -> list[ShardedKVCache]:
        """An empty cache, one for each layer."""
        history = TokenHistory()
        return [ShardedKVCache(self.ring, window, history) for window in self.windows]


def shard(model: nn.Module, ring: Ring | Grid, weights: Sequence[float] | None = None) -> nn.Module:
    """Spread the context of `model` over `ring`: each rank keeps a part of the keys and values.

    The model is changed in place, as by mlx-lm's own `model.shard`. Its `make_cache` then returns sharded caches. A
    call with such a cache is collective, and every rank passes the same tokens. Many tokens are cut into one chunk a
    rank; few tokens are computed by every rank. With other caches, or none, the model works as before.

    With a `ringattn.grid`, the ranks of a row share the weights, and the context is spread over the column. A model
    that mlx-lm's `model.shard` has divided already is accepted as it is.

    Args:
        model: An mlx-lm model whose layers call mlx-lm's attention. Its weights are the same on every rank, or divided
            over the rank's row.
        ring: The ring, of `ringattn.init`; or a grid; or, for a model that is divided already, the ring of all ranks
            that hold the same part of the weights (a column).
        weights: The speed of each rank of the ring or the column, one number a rank: its share of prefill and of the
            cache. Default: all equal.

    Returns:
        `model`.

    Raises:
        UnsupportedModelError: A layer or cache of the model cannot be sharded, or its weights cannot be divided among
            the ranks of a row; the message names it.
        ArgumentError: The ranks of `ring` hold different parts of the weights.
    """
    grid = ring if isinstance(ring, Grid) else None
    ring = check_ring(ring if grid is None else grid.column)
    weights = (1.0,) * ring.size if weights is None else tuple(map(float, weights))
    if len(weights) != ring.size or not all(0 < w < float("inf") for w in weights):
        raise ArgumentError(f"weights: {weights}, expected {ring.size} finite numbers above 0, one a rank")
    check_no_pipeline(model)
    windows = list(_windows(model))
    part = _divide_weights(model, ring, grid)
    _patch_attention(model)
    longest = longest_context(_trace(model, windows))
    kind = type(model)
    if not isinstance(model, Sharded):
        model.__class__ = type(f"Sharded{kind.__name__}", (Sharded, kind), {"__module__": kind.__module__})
    everyone = ring if part[1] == 1 else None
    for name, value in (
        ("ring", ring),
        ("everyone", everyone if grid is None else check_ring(grid.ring)),
        ("part", part),
        ("weights", weights),
        ("windows", windows),
        ("cost", cost_of(model, part[1])),
        ("longest", longest),
    ):
        object.__setattr__(model, name, value)  # not as parameters
    return model


def sharded(model: nn.Module) -> Any:
    """`model`, if it is sharded."""
    if not isinstance(model, Sharded):
        raise ArgumentError("model: not sharded, expected one that went through ringattn.lm.shard")
    return model


def everyone_of(model: Sharded) -> Transport:
    """The ring of all ranks that have a part of a sharded model."""
    if model.everyone is None:
        raise ArgumentError(
            f"model: its weights are divided among {model.part[1]} ranks, and one rank must sample for all: give "
            "ringattn.lm.shard a grid, of ringattn.grid(ring, group=group)"
        )
    return model.everyone


def _divide_weights(model: nn.Module, ring: Transport, grid: Grid | None) -> tuple[int, int]:
    """Divide the weights over the grid's row, unless they are divided already; return the part of this rank.

    Collective where the weights were divided before: a ring that crosses rows would give wrong numbers.
    """
    group = group_of(model)
    if group is None and grid is not None and grid.row is not None:
        shard_weights(model, grid.row)
        evaluate_weights(model)
        group = grid.row
    part = (0, 1) if group is None else (group.rank(), group.size())
    if grid is not None and part[1] != grid.tensor:
        raise ArgumentError(f"model: its weights are divided by {part[1]}, expected {grid.tensor}, the row of the grid")
    if part[1] > 1:
        agree(ring, "shard", (("part of the weights", f"{part[0] + 1} of {part[1]}"),))
    return part


def _windows(model: nn.Module) -> Iterator[int | None]:
    """The window of each layer, also of a model that was sharded before."""
    return iter(model.windows) if isinstance(model, Sharded) else compat.layer_windows(model)


def _trace(model: nn.Module, windows: Sequence[int | None]) -> list[RopeCall]:
    """Check that each layer attends to the keys of its own or of another layer's cache; return the calls of ropes.

    Nothing is evaluated.
    """
    name = compat.model_name(model)
    if type(model).__module__ in compat.UNSUITABLE:
        raise UnsupportedModelError(f"model: {name} {compat.UNSUITABLE[type(model).__module__]}")
    caches = [TracingCache(window) for window in windows]
    kind = type(model).__mro__[2] if isinstance(model, Sharded) else type(model)
    try:
        with recorded_ropes(model) as calls, step_through(caches, Step(Layout((((0, 2),),)), False)):
            kind.__call__(model, mx.zeros((1, 2), mx.int32), cache=caches)
    except ArgumentError as error:
        raise UnsupportedModelError(f"model: {name} has a layer of another kind: {error}") from None
    return calls


def _patch_attention(model: nn.Module) -> None:
    """Replace the attention of the model's layers, in the modules of mlx-lm that define them.

    Calls without a sharded cache go on to mlx-lm's own function.
    """
    kinds = {type(part) for part in model.modules()}
    adapted = {key: kind for kind in kinds if (key := (kind.__module__, kind.__name__)) in ADAPTERS}
    for key, kind in adapted.items():
        compat.patch(kind, "__call__", partial(_adapted_call, ADAPTERS[key]))
    found = bool(adapted)
    for module in compat.defining_modules(model):
        if any(key[0] == module.__name__ for key in adapted) or not hasattr(module, compat.ATTENTION):
            continue
        if compat.makes_mask_arrays(module):
            raise UnsupportedModelError(
                f"model: {compat.model_name(model)} does arithmetic on its mask ({module.__name__}), and there is no "
                "adapter for it"
            )
        compat.patch(module, compat.ATTENTION, dispatching)
        found = True
    if not found:
        name = compat.model_name(model)
        raise UnsupportedModelError(f"model: {name} has no layer that calls mlx-lm's {compat.ATTENTION}")


def _adapted_call(adapter: Any, plain: Any) -> Any:
    """The `__call__` of a layer, `plain`, with calls that have a sharded cache passed to `adapter`."""

    def call(layer: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        run = adapter if isinstance(cache, ShardedKVCache) else plain
        return run(layer, x, mask, cache)

    return call


def cost_of(model: nn.Module, parts: int = 1) -> Cost:
    """Operations of one layer on a token: two for each weight that it meets, and those of a score and its value.

    `parts` is the number of ranks among which the weights and the heads are divided.
    """
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
    return Cost(linear / layers, 4.0 * heads * dim / parts)
