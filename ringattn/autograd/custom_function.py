"""Computations outside MLX's graph, and their behaviour under MLX's transformations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import mlx.core as mx

from ..errors import RingAttentionError, TransformError
from .checkpointing import record_or_replay

Arrays = Sequence[mx.array]


def custom_op(
    what: str, compute: Callable[..., Arrays], arrays: Arrays, gradient: Callable[..., Arrays] | None = None
) -> Arrays:
    """Run `compute` on `arrays`, which it may evaluate. An unsupported transformation raises.

    Without this wrapper a gradient through values that left the graph would silently be zero. `arrays` must contain
    every array that `compute` uses: MLX does not see an array in a closure.

    Args:
        what: The name of the computation, for messages.
        compute: A function of `arrays` that returns a sequence of arrays.
        arrays: The inputs.
        gradient: A function of the arrays, the gradients of the loss with respect to the results, and the results, in
            this order. It returns the gradients with respect to the arrays. ``None`` where there is no gradient. It is
            not differentiable itself.

    Raises:
        TransformError: Under mx.compile, mx.vmap, mx.jvp, or a gradient that is not provided.
    """
    compute = _marked(compute)
    function: Any = mx.custom_function(compute if gradient is None else record_or_replay(compute))

    def unsupported(name: str) -> Callable:
        def refuse(*_):
            raise TransformError(f"{what}: {name} is not supported")

        return refuse

    if gradient is None:
        second = what.startswith("the gradient of")
        function.vjp(unsupported("a second derivative" if second else "the gradient (mx.grad, mx.vjp)"))
    else:
        of = gradient
        function.vjp(
            lambda *given: custom_op(f"the gradient of {what}", of, [x for group in map(_listed, given) for x in group])
        )
    function.jvp(unsupported("forward-mode differentiation (mx.jvp)"))
    function.vmap(unsupported("mx.vmap"))
    try:
        return function(*arrays)
    except ValueError as error:
        if isinstance(error, RingAttentionError) or "function transformations" not in str(error):
            raise
        raise TransformError(f"{what}: mx.compile and mx.vmap are not supported around it") from None


def _listed(arrays: mx.array | Arrays) -> Arrays:
    """Make a list of what MLX passes for the inputs or results: a single array comes as itself."""
    return [arrays] if isinstance(arrays, mx.array) else arrays


_outside: ContextVar[bool] = ContextVar("ringattn_outside", default=False)


def inside_custom_op() -> bool:
    """Return whether an `custom_op` computation is running. MLX then keeps nothing for a gradient."""
    return _outside.get()


def _marked(compute: Callable[..., Arrays]) -> Callable[..., Arrays]:
    def run(*arrays: mx.array) -> Arrays:
        before = _outside.set(True)
        try:
            return compute(*arrays)
        finally:
            _outside.reset(before)

    return run
