"""Computations that happen outside MLX's graph, and what MLX's transformations get to hear about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from .errors import RingAttentionError, TransformError

Arrays = Sequence[mx.array]


def opaque(what: str, compute: Callable[..., tuple[mx.array, ...]], arrays: Arrays) -> tuple[mx.array, ...]:
    """Run `compute` on `arrays`, which it may evaluate; a transformation that reaches it raises `TransformError`.

    Without this a gradient through values that left the graph would silently be zero. Every array that `compute` uses
    must be in `arrays`: one it closed over would go unnoticed.
    """
    function: Any = mx.custom_function(compute)

    def unsupported(name: str) -> Callable:
        def refuse(*_):
            raise TransformError(f"{what}: {name} is not supported")

        return refuse

    function.vjp(unsupported("the gradient (mx.grad, mx.vjp)"))
    function.jvp(unsupported("forward-mode differentiation (mx.jvp)"))
    function.vmap(unsupported("mx.vmap"))
    try:
        return function(*arrays)
    except ValueError as error:
        if isinstance(error, RingAttentionError) or "function transformations" not in str(error):
            raise
        raise TransformError(f"{what}: mx.compile and mx.vmap are not supported around it") from None


def start_evaluation(*arrays: mx.array) -> None:
    """Evaluate `arrays` without waiting where MLX can; raise now, not later, if a transformation traces them."""
    try:
        mx.async_eval(*arrays)
    except ValueError:
        mx.eval(*arrays)  # under mx.grad this is allowed and that is not; under mx.compile and mx.vmap this raises too
