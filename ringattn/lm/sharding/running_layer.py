"""The recurrent layer that runs: calls inside it go to functions that know its cache."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import mlx.core as mx

from .forward_pass import current
from .recurrent_cache import RecurrentCache, TracingRecurrentCache

Result = tuple[mx.array, mx.array]  # outputs, and the state after the tokens
Run = Callable[..., Any]


def reading_cache() -> RecurrentCache | None:
    """The cache of the recurrent layer that runs."""
    return current.reading if isinstance(current.reading, RecurrentCache) else None


def in_layer(run: Run) -> Callable[[Run], Run]:
    """Wrap a function or method of mlx-lm: calls of a layer with a sharded cache go to ``run(plain, cache, ...)``."""

    def wrap(plain: Run) -> Run:
        def call(*args: Any, **options: Any) -> Any:
            cache = reading_cache()
            return plain(*args, **options) if cache is None else run(plain, cache, *args, **options)

        return call

    return wrap


def recurrence(run: Run) -> Callable[[Run], Run]:
    """Wrap a recurrence of mlx-lm: calls of a layer whose tokens are spread over a ring go to ``run``.

    Outputs have the dtype of the first array among the arguments, also where the state has a wider one.
    """

    def of_layer(plain: Run, cache: RecurrentCache, *args: Any, **options: Any) -> Result:
        out, state = run(plain, cache, *args, **options) if cache.shared else plain(*args, **options)
        if isinstance(cache, TracingRecurrentCache):
            cache.note_state(state)
        dtype = next(x.dtype for x in chain(args, options.values()) if isinstance(x, mx.array))
        return out.astype(dtype), state

    return in_layer(of_layer)
