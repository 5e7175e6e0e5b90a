"""Computations that happen outside MLX's graph, and what MLX's transformations get to hear about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import mlx.core as mx

from ..core.arrays import view
from ..errors import RingAttentionError, TransformError
from .checkpointing import kept

Arrays = Sequence[mx.array]


def opaque(
    what: str, compute: Callable[..., Arrays], arrays: Arrays, gradient: Callable[..., Arrays] | None = None
) -> Arrays:
    """Run `compute` on `arrays`, which it may evaluate; a transformation that is not provided for raises.

    Without this a gradient through values that left the graph would silently be zero. Every array that `compute` uses
    must be in `arrays`: one it closed over would go unnoticed.

    Args:
        what: The name of the computation, for messages.
        compute: Takes `arrays`, returns a sequence of arrays.
        arrays: At least two of them.
        gradient: Takes the arrays, the gradients of the loss by the results, and the results, one after the other, and
            returns the gradients by the arrays; ``None`` where there is none. It has no gradient itself.

    Raises:
        TransformError: When mx.compile, mx.vmap, mx.jvp or a gradient that is not there reaches it.
    """
    compute = _marked(compute)
    function: Any = mx.custom_function(compute if gradient is None else kept(compute))

    def unsupported(name: str) -> Callable:
        def refuse(*_):
            raise TransformError(f"{what}: {name} is not supported")

        return refuse

    if gradient is None:
        second = what.startswith("the gradient of")
        function.vjp(unsupported("a second derivative" if second else "the gradient (mx.grad, mx.vjp)"))
    else:
        of = gradient
        function.vjp(lambda *given: opaque(f"the gradient of {what}", of, [x for arrays in given for x in arrays]))
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


def settled(arrays: Arrays) -> Arrays:
    """`arrays`, whose evaluation has begun; inside a transformation evaluated copies that hold on to nothing.

    There MLX keeps all that an array was computed from as long as the array lives, evaluated or not.
    """
    try:
        mx.async_eval(*arrays)
    except ValueError:
        mx.eval(*arrays)
        return [_copy(x) for x in arrays]
    return arrays


def _copy(x: mx.array) -> mx.array:
    y = mx.array(view(x))
    return y.view(mx.bfloat16) if x.dtype == mx.bfloat16 else y


_outside: ContextVar[bool] = ContextVar("ringattn_outside", default=False)


def outside() -> bool:
    """Whether this is inside an `opaque` computation, of which MLX need not keep anything for a gradient."""
    return _outside.get()


def _marked(compute: Callable[..., Arrays]) -> Callable[..., Arrays]:
    def run(*arrays: mx.array) -> Arrays:
        before = _outside.set(True)
        try:
            return compute(*arrays)
        finally:
            _outside.reset(before)

    return run


class InFlight:
    """Two dispatches at a time: the next is started when the last but one has ended."""

    def __init__(self) -> None:
        self._last: Arrays = []

    def add(self, outputs: Arrays) -> Arrays:
        """`outputs`, `settled`, once those before have been evaluated."""
        outputs = settled(outputs)
        mx.eval(*self._last)
        self._last = outputs
        return outputs
