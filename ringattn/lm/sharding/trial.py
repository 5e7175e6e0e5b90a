"""A trial pass of a few tokens through a model, to see whether its layers use their caches as a ring allows.

Nothing is evaluated: the pass takes milliseconds for a model of any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...errors import ArgumentError, UnsupportedModelError
from ...layout import Layout
from ...transport.solo import SoloRing
from ..mlx_lm_compat import model_name
from .chunked_cache import Chunk
from .forward_pass import flat, step_through
from .partition import Step
from .ropes import RopeCall, recorded_ropes
from .sharded_cache import ShardedKVCache

HELD = Layout((((3, 5),),), 3)  # the tokens in a cache before the pass: fewer than came before, as on a rank
STEP = Step(Layout((((5, 7),),), 5), False)


class TracingCache(ShardedKVCache):
    """A cache for the trial pass. Attention over it computes nothing.

    Attributes:
        used: Whether the layer put keys into the cache.
        attended: Whether attention reached these keys.
    """

    def __init__(self, window: int | None = None):
        super().__init__(SoloRing(60.0), window)
        self.layout = HELD
        self.used = False
        self.attended = False

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = (mx.repeat(x[:, :, :1], self.held, 2) for x in (keys, values))
        self.used = True
        return super().update_and_fetch(keys, values)

    def in_trial(self) -> bool:
        self.attended = True
        return True

    # What a model asks of a cache with chunks.
    start_position = 0

    def maybe_trim_front(self) -> None:
        pass

    def constraints(self, mask: Any) -> dict[str, Any]:
        return {} if isinstance(self.window, Chunk) else super().constraints(mask)


def trial_pass(model: nn.Module, kind: type[nn.Module], caches: Sequence[Any]) -> list[RopeCall]:
    """Check that each layer attends to the keys of caches and finds its positions; return the calls of ropes.

    Args:
        model: The model, with its attention patched.
        kind: The model's class in mlx-lm.
        caches: A `TracingCache`, or a list of them, for each layer.

    Raises:
        UnsupportedModelError: A layer does what a ring does not allow. The message names it.
    """
    name = model_name(model)
    leaves = flat(caches)
    try:
        with recorded_ropes(model) as calls, step_through(leaves, STEP):
            kind.__call__(model, mx.zeros((1, STEP.new.length), mx.int32), cache=caches)
    except ArgumentError as error:
        raise UnsupportedModelError(f"model: {name} has a layer of another kind: {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UnsupportedModelError(
            f"model: {name} has a layer that does its own arithmetic on masks or caches ({type(error).__name__})"
        ) from error
    for i, cache in enumerate(leaves):
        if isinstance(cache, TracingCache) and cache.used and not cache.attended:
            raise UnsupportedModelError(
                f"model: {name} has a layer that uses the keys of cache {i} otherwise than in mlx-lm's attention"
            )
    for call in calls:
        offset = call.arguments.arguments.get("offset", 0)
        if isinstance(offset, int) and offset != STEP.new.start:
            raise UnsupportedModelError(
                f"model: {name} counts the keys of a cache to find positions, and a rank has but a part of them "
                f"(a rope at position {offset}, expected {STEP.new.start})"
            )
    return calls
