"""Sharding a model's context: the model stays as it is, and its layers' caches and attention are spread over a ring."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import ArgumentError, UnsupportedModelError
from ..ring.call import check_ring
from ..transport.base import Ring
from ..transport.consensus import agree, raise_on_all_ranks
from ..transport.grid import Grid
from ..transport.interface import Transport
from ..transport.shared_input import SharedInput
from . import mlx_lm_compat as compat
from .memory import Footprint, footprint_of
from .sharding.attention import dispatching, dispatching_core
from .sharding.cache_kinds import Kind, cache_kinds, traced_kinds
from .sharding.forward_pass import ShardedCache, cut_at_marks, flat, step_through
from .sharding.history import TokenHistory
from .sharding.layer_adapters import wrapper_of
from .sharding.output_layer import patch_output_layers
from .sharding.partition import Cost, next_step
from .sharding.patch_points import patch_recurrences
from .sharding.ropes import longest_context
from .sharding.sharded_cache import ShardedKVCache
from .sharding.short_convolution import patch_convolutions
from .sharding.trial import trial_pass
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
    kinds: list[Kind]  # of the layers' caches
    longest: float  # tokens of context
    footprint: Footprint

    def __call__(self, inputs: mx.array, cache: Sequence[Any] | None = None, **rest: Any) -> mx.array:
        """Run the model on `inputs`, which are the same on every rank. Collective where the caches are sharded.

        Returns:
            The logits of the tokens that this rank computed: for many tokens its chunk of them, otherwise all. Where
            a cache has a mark among the tokens, only the tokens after it count.
        """
        sharded = [c for c in flat(cache or ()) if isinstance(c, ShardedCache)]
        if not sharded:
            return super().__call__(inputs, cache=cache, **rest)  # type: ignore[misc]
        *before, last = cut_at_marks(sharded, inputs.shape[1])
        for part in before:
            self._sharded_pass(inputs[:, part], cache, sharded, False, _part(rest, part))
        return self._sharded_pass(inputs[:, last], cache, sharded, True, _part(rest, last))

    def _sharded_pass(
        self, inputs: mx.array, cache: Any, sharded: list[ShardedCache], is_read: bool, rest: dict[str, Any]
    ) -> mx.array:
        """Run the model on tokens among which no cache has a mark; `is_read`: whether the caller gets the logits."""
        # The few tokens of a layer with a window, or none of a recurrent one, say little about which rank has room.
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
            rest = _part(rest, own)
        for history in dict.fromkeys(c.history for c in sharded):
            history.write(step.new.start, tokens)
        is_read = is_read and any(step.new.stop > c.unread for c in sharded)
        with self.ring.sharing(shared), step_through(sharded, step, is_read):
            return super().__call__(inputs, cache=cache, **rest)  # type: ignore[misc]

    def make_cache(self) -> list[Any]:
        """An empty cache, one for each layer."""
        history = TokenHistory()
        return [kind.make(self.ring, history) for kind in self.kinds]


def shard(model: nn.Module, ring: Ring | Grid, weights: Sequence[float] | None = None) -> nn.Module:
    """Spread the context of `model` over `ring`: each rank keeps a part of the keys and values.

    The states of recurrent layers are the same on every rank, and do not grow with the context.

    The model is changed in place, as by mlx-lm's own `model.shard`. Its `make_cache` then returns sharded caches. A
    call with such a cache is collective, and every rank passes the same tokens. Many tokens are cut into one chunk a
    rank; few tokens are computed by every rank. With other caches, or none, the model works as before.

    With a `ringattn.grid`, the ranks of a row share the weights, and the context is spread over the column. A model
    that mlx-lm's `model.shard` has divided already is accepted as it is.

    Args:
        model: An mlx-lm model whose layers call mlx-lm's attention and recurrences. Its weights are the same on every
            rank, or divided over the rank's row.
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
    kinds = list(model.kinds) if isinstance(model, Sharded) else cache_kinds(model)
    part = _divide_weights(model, ring, grid)
    patch_convolutions(model)
    patch_output_layers(model)
    _patch_functions(model)
    kind = type(model).__mro__[2] if isinstance(model, Sharded) else type(model)
    caches = [one.make_tracing() for one in kinds]
    longest = longest_context(trial_pass(model, kind, caches))
    kinds = traced_kinds(model, kinds, caches)
    if not isinstance(model, Sharded):
        model.__class__ = type(f"Sharded{kind.__name__}", (Sharded, kind), {"__module__": kind.__module__})
    everyone = ring if part[1] == 1 else None
    for name, value in (
        ("ring", ring),
        ("everyone", everyone if grid is None else check_ring(grid.ring)),
        ("part", part),
        ("weights", weights),
        ("kinds", kinds),
        ("cost", cost_of(model, kinds, part[1])),
        ("longest", longest),
        ("footprint", footprint_of(model, kinds, caches)),
    ):
        object.__setattr__(model, name, value)  # not as parameters
    return model


def _part(rest: dict[str, Any], tokens: slice) -> dict[str, Any]:
    """The further arguments of a model's call for some of its tokens."""
    embeddings = rest.get("input_embeddings")
    return rest if embeddings is None else {**rest, "input_embeddings": embeddings[:, tokens]}


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
        with nullcontext() if grid is None else raise_on_all_ranks(check_ring(grid.ring), "shard"):
            agree(ring, "shard", (("part of the weights", f"{part[0] + 1} of {part[1]}"),))
    return part


def _patch_functions(model: nn.Module) -> None:
    """Replace the attention and the recurrences of the model's layers, in the modules of mlx-lm that define them.

    Calls without a sharded cache go on to mlx-lm's own function.
    """
    found = patch_recurrences(model)
    for kind, part in {type(part): part for part in model.modules()}.items():
        wrapper = wrapper_of(part)
        if wrapper is not None:
            compat.patch(kind, "__call__", wrapper)
            found = True
    for module in compat.defining_modules(model):
        if compat.calls_fast_attention(module):
            compat.patch(module, "mx", dispatching_core)
            found = True
        if hasattr(module, compat.ATTENTION):
            compat.patch(module, compat.ATTENTION, dispatching)
            found = True
    if not found:
        name = compat.model_name(model)
        raise UnsupportedModelError(f"model: {name} has no layer that calls mlx-lm's {compat.ATTENTION}")


def cost_of(model: nn.Module, kinds: Sequence[Kind], parts: int = 1) -> Cost:
    """Operations of a mean layer on a token: two for each weight that it meets, and those of a score and its value.

    `parts` is the number of ranks among which the weights and the heads are divided.
    """
    described = (compat.model_args(part) for part in (model, *model.modules()))
    args = next((args for args in described if hasattr(args, "num_attention_heads")), None)
    layers = max(1, len(model.layers))
    experts = getattr(args, "num_experts_per_tok", None) or EXPERTS
    linear = 0.0
    for part in (part for layer in model.layers if layer is not None for part in layer.modules()):
        weight = part.get("weight") if isinstance(part, dict) else None
        if isinstance(weight, mx.array) and weight.ndim >= 2:
            size = weight.size * (32 // part.bits if hasattr(part, "bits") else 1)
            linear += 2 * size * (experts / weight.shape[0] if compat.is_mixture(part) else 1)
    heads = getattr(args, "num_attention_heads", 0) or 0
    dim = compat.score_dim(args, heads)
    attending = sum(isinstance(cache, ShardedKVCache) for kind in kinds for cache in flat([kind.make_tracing()]))
    return Cost(linear / layers, 4.0 * heads * dim * attending / layers / parts)
